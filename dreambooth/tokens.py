"""Rare tokens: which words of a tokenizer are free to mean a subject, and what a word that was chosen splits into.

A CLIP tokenizer numbers its tokens in the order in which byte pair encoding merged them, most frequent pair first, so a late token is one
that the text encoder has hardly ever seen (Ruiz et al. 2023, sec. 3.2, asks for such words; its range of ids belongs to another tokenizer).
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

RARE_FROM = 0.8  # a token is rare in the last fifth of the merges
END = "</w>"  # closes a token that ends a word

# Short words that a late merge can still be: English, and names that everybody knows.
WORDS = frozenset(
    """a abs ace act ad ado age ago ah aid ail aim air ale all alp am amp an and ant any ape apt arc are ark arm art as ash ask asp ass at ate
    aux awe awl axe aye baa bad bag bah ban bar bat bay be bed bee beg bet bib bid big bin bit boa bob bog boo bow box boy bra bud bug bum bun
    bus but buy by bye cab cad cam can cap car cat caw cob cod cog con coo cop cot cow coy cry cub cud cue cup cur cut dab dad dam day deb den
    dew did die dig dim din dip do doe dog don dot dry dub dud due dug duo dye ear eat ebb eel egg ego eke elf elk elm emu end eon era erg err
    eve ewe eye fab fad fan far fat fax fed fee few fib fig fin fir fit fix flu fly fob foe fog fop for fox fry fun fur gab gag gal gap gas gay
    gel gem get gig gin gnu go god goo got gum gun gut guy gym ha had hag ham has hat haw hay he hem hen her hew hex hey hi hid him hip his hit
    hob hoe hog hop hot how hub hue hug hum hut ice icy if ilk ill imp in ink inn ion ire irk is it its ivy jab jag jam jar jaw jay jet jig job
    jog jot joy jug jut keg ken key kid kin kit koi lab lad lag lam lap law lax lay lea led leg let lid lie lip lit lob log lop lot low lug lye
    ma mad man map mar mat maw max may me men met mid mix mob mom moo mop mow mud mug mum my nab nag nap nay net new nib nil nip nit no nod nor
    not now nun nut oaf oak oar oat odd ode of off oft oh oil old on one opt or orb ore our out ova owe owl own ox pa pad pal pan pap par pat
    paw pay pea peg pen pep per pet pew pi pie pig pin pit pix ply pod pop pot pox pro pry pub pug pun pup pus put rag ram ran rap rat raw ray
    red ref rep rib rid rig rim rip rob rod roe rot row rub rue rug rum run rut rye sac sad sag sap sat saw sax say sea see set sew sex she shy
    sin sip sir sis sit six ski sky sly so sob sod son sop sot sow soy spa spy sty sub sue sum sun sup tab tad tag tan tap tar tax tea ted tee
    ten the thy tic tie tin tip to toe ton too top tor tot tow toy try tub tug tux two ugh up urn us use van vat vet vex via vie vow wad wag
    wan war was wax way we web wed wee wet who why wig win wit woe wok won woo wow wry yak yam yap yaw yea yen yep yes yet yew yin you yup zap
    zen zig zip zit zoo
    abe ada ali amy ana ann ava ben bob dan deb don ed eli eva eve gus guy hal ian ida ira jan jay jen jim joe jon kai kay ken kim kit lee leo
    liz lou luv mac mae max meg mia ned nia nik pam pat peg ray rob ron roy sam sid sue tam ted tia tim tom val van vic viv wes zac zoe""".split()
)
MEANINGS = {  # what short names stand for, by what a picture of them shows
    "a rifle": "sks akm ak ar fal hk",
    "a pistol or a submachine gun": "uzi mac mp sig",
    "a broadcaster or a channel": "bbc cnn nbc abc cbs fox pbs cbc itv hbo mtv vh sky npr ndtv",
    "a sports league or club": "nba nfl nhl mlb mls ufc wwe epl ipl fifa uefa ncaa psg lfc mcfc mufc cfc afc bvb f1",
    "a music group or style": "bts exo nct abba ac dc edm dj kpop emo rnb acdc nin nwa",
    "a country, a region or a city": "usa uk uae eu nyc la sf dc nz ksa hk uss ussr ddr prc rok aus chi atl phx den pdx sfo lax jfk bkk",
    "a company or a product": "ibm bmw vw kfc ups dhl hp lg htc rca jbl aol sap sas nec tdk gm gmc kia audi asus bp ge wii ps ios imac lego ikea",
    "an agency or an office": "fbi cia nsa nasa esa un who nato irs epa fda cdc dea atf kgb mi",
    "a kind of file, of text or of picture": "jpg jpeg png gif pdf svg psd bmp tif raw mp mpg avi html css php xml sql usb cad gui hdr",
    "a message's abbreviation": "lol omg wtf lmao rofl tbt fyi faq diy asap btw brb idk imo smh ftw rip vip bff ootd",
    "a month or a day": "jan feb mar apr may jun jul aug sep oct nov dec mon tue wed thu fri sat sun",
    "a degree or a title": "mr mrs ms dr phd mba ceo cfo cto bsc",
    "a unit or a money": "km cm mm kg lb lbs oz ml hz ghz mb gb tb kb kw kwh mph rpm usd eur gbp inr cad aud",
}
MEANING_OF = {word: meaning for meaning, words in MEANINGS.items() for word in words.split()}


class Verdict(NamedTuple):
    """What a word is to a tokenizer."""

    word: str
    pieces: list[str]  # the tokens that it splits into, as they are read
    ids: list[int]
    kind: str  # "rare" (fit to be an identifier), "several" (tokens), "common", or "meaning" (rare, but it stands for something)
    sentence: str  # the same for people, with what to do


class RareToken(NamedTuple):
    """A word that is one late token."""

    word: str
    token_id: int


def judge(tokenizer: Any, word: str, free: Sequence[str] = ()) -> Verdict:
    """Returns what a word splits into, and whether it is fit to name a subject.

    Args:
        tokenizer: a CLIP tokenizer of transformers.
        word: as it would stand in a prompt.
        free: the words known to mean nothing to this model, for one whose tokens do not follow frequency, as the lab's; () for the others.
    """
    ids = tokenizer(word, add_special_tokens=False).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    pieces = [token.removesuffix(END) for token in tokens]
    plain, shown = word.strip().lower(), f"{word!r} is"
    if len(ids) != 1:
        kind, told = "several", f"{len(ids)} tokens, {' + '.join(pieces)}: each has a past of its own; choose a single rare one"
    elif plain in free or tokens[0] in tokenizer.get_added_vocab():
        kind, told = "rare", f"a single token (id {ids[0]}) without a past"
    elif free or _ranks(tokenizer).get(ids[0], 0.0) < RARE_FROM or plain in WORDS:
        kind, told = "common", f"a common word (token {ids[0]} of {len(tokenizer)}): the model would have to unlearn it; choose a rare one"
    elif plain in MEANING_OF:
        kind, told = "meaning", f"a single rare token (id {ids[0]} of {len(tokenizer)}), but it means something: {MEANING_OF[plain]}"
    else:
        kind, told = "rare", f"a single rare token (id {ids[0]} of {len(tokenizer)})"
    return Verdict(word, pieces, ids, kind, f"{shown} {told}")


def rare_tokens(tokenizer: Any, count: int, seed: int = 0, longest: int = 3) -> list[RareToken]:
    """Returns words that are one late token each, drawn at random without replacement, in the order of their ids.

    Whole words of ASCII letters that the tokenizer reads back as themselves; not the words and abbreviations that are listed here.

    Args:
        tokenizer: a CLIP tokenizer of transformers.
        count: how many; fewer come back where there are no more.
        seed: of the draw.
        longest: letters, at most (Ruiz et al. 2023, sec. 3.2: three).
    """
    ranks, found = _ranks(tokenizer), []
    for token, token_id in tokenizer.get_vocab().items():
        word = token.removesuffix(END)
        if not token.endswith(END) or not 1 < len(word) <= longest or not word.isascii() or not word.isalpha():
            continue
        if ranks.get(token_id, 0.0) < RARE_FROM or word in WORDS or word in MEANING_OF:
            continue
        if tokenizer(word, add_special_tokens=False).input_ids == [token_id]:  # else an earlier merge takes it apart
            found.append(RareToken(word, token_id))
    found.sort(key=lambda token: token.token_id)
    return sorted(random.Random(seed).sample(found, min(count, len(found))), key=lambda token: token.token_id)


def _ranks(tokenizer: Any) -> dict[int, float]:
    """Returns where in the order of the merges each token stands, in [0, 1); single letters, marks and added tokens are no merges."""
    apart = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    merged = sorted(number for token, number in tokenizer.get_vocab().items() if token not in apart and len(token.removesuffix(END)) > 1)
    return {token_id: place / len(merged) for place, token_id in enumerate(merged)}

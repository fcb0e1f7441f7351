"""Stage scorers: the identity encoder (DINO's role) and the image and text encoders (CLIP's role), at the full 64 pixels.

What each should and should not see decides the training:
- Shifts, mirrored pictures, brightness and faint noise are passed over: they are augmentations.
- The codec is passed over too: a share of the pictures goes through it, since everything that is generated comes out of it. It is the
  measure of what still counts as sharp.
- Blur beyond that is *not* an augmentation, which would teach to forgive it, but a negative: for each picture, blurred copies of its
  partner compete with the partner itself, so that a soft picture of the right subject or scene scores below a sharp one.
- Colours: in a batch, class and place alone nearly always single out the right caption. So each caption also competes with a copy in which
  one colour word is another one, and half of the captions are the full ones, which name the colour.
- Classes: nor does a batch hold many pictures of one place, so the place alone singles out most captions. Each caption also competes with
  copies that name other classes. (Without them 24,832 pictures taught to find a caption among 32 in 95 % of renders, and to name the class in 66 %.)
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth.lab.identities import COLORS
from dreambooth.lab.measures import caption_retrieval, same_subject_auc
from dreambooth.lab.pretraining.autoencoder import roundtrip
from dreambooth.lab.pretraining.data import BLOCK, HeldOut, Renders
from dreambooth.lab.pretraining.tokenizer import token_ids
from dreambooth.lab.pretraining.training import CAPTIONS, IDENTITY, Job, Place, generator, precision
from dreambooth.lab.scorers import ImageEncoder, Layout, new_text_encoder
from dreambooth.lab.splits import TRAINED_CLASSES
from dreambooth.metrics.pixels import blur

SHIFT_PX, GAIN, NOISE = 4, 0.12, 0.03  # augmentations: at most; +- share of brightness; deviation, of a range of 2
CODEC_SHARE = 0.25  # of the pictures
BLURRED_SHARE = 0.5  # of the pictures have a blurred copy as a negative
BLUR_SIGMAS = (1.2, 2.0)  # px: from clearly softer than the codec
WRONG_NOUNS = 3  # copies of each caption that name another class
IDENTITY_SCALE = 14.0  # cosine to logit
SUBJECTS_PER_CLASS = 32  # the rivals of one class in a batch, about
LARGEST_SCALE = 60.0


class Augmentation:
    """Random changes that do not change what a picture shows, and the blur that does; all from a given generator."""

    def __init__(self, vae: Any | None, draws: torch.Generator) -> None:
        self.vae, self.draws = vae, draws

    def __call__(self, pictures: Tensor) -> Tensor:
        """Returns the pictures shifted, perhaps mirrored, brighter or darker, with faint noise; a share of them through the codec."""
        count, device = len(pictures), pictures.device
        pictures = self._through_codec(pictures)
        mirrored = self.uniform(count, 1, 1, 1) < 0.5
        pictures = torch.where(mirrored, pictures.flip(-1), pictures)
        down, right = torch.randint(2 * SHIFT_PX + 1, (2,), generator=self.draws, device=device).tolist()
        side = pictures.shape[-1]
        pictures = F.pad(pictures, (SHIFT_PX,) * 4, mode="reflect")[..., down : down + side, right : right + side]
        gain = 1 + GAIN * (2 * self.uniform(count, 1, 1, 1) - 1)
        noise = torch.randn(pictures.shape, generator=self.draws, device=device)
        return ((pictures + 1) * gain - 1 + NOISE * noise).clamp(-1, 1).contiguous(memory_format=torch.channels_last)

    def blurred(self, pictures: Tensor) -> Tensor:
        """Returns a share of the pictures, from the first one, under one drawn blur."""
        low, high = BLUR_SIGMAS
        sigma = low + (high - low) * float(self.uniform(()))
        return blur(pictures[: max(1, int(len(pictures) * BLURRED_SHARE))], sigma).contiguous(memory_format=torch.channels_last)

    def uniform(self, *shape: Any) -> Tensor:
        """Returns uniform numbers in [0, 1)."""
        return torch.rand(*shape, generator=self.draws, device=self.draws.device)

    def _through_codec(self, pictures: Tensor) -> Tensor:
        """Returns the pictures, the first CODEC_SHARE of them decoded from their latents (batches come in random order)."""
        count = int(len(pictures) * CODEC_SHARE)
        if self.vae is None or not count:
            return pictures
        return torch.cat([roundtrip(self.vae, pictures[:count]), pictures[count:]])


def contrast(similarity: Tensor, negatives: Tensor | None = None) -> Tensor:
    """Returns the mean cross entropy of picking the diagonal in each row of logits (n, n), further negatives (n, k) added to each row."""
    logits = similarity if negatives is None else torch.cat([similarity, negatives], 1)
    return F.cross_entropy(logits, torch.arange(len(similarity), device=similarity.device))


class IdentityJob(Job):
    """The training of the identity encoder: two pictures of one subject against all others of the batch, mostly of a few classes."""

    name = "identity"

    def __init__(self, recipe: dict[str, Any], layout: Layout, renders: Renders, judged: HeldOut, vae: Any | None, place: Place) -> None:
        self.recipe, self.renders, self.judged, self.place, self.vae = recipe, renders, judged, place, vae
        self.batch_size, self.matrix_lr, self.other_lr = recipe["batch_size"], recipe["matrix_lr"], recipe["other_lr"]
        torch.manual_seed(place.seed + 1)
        self.networks = {"identity": ImageEncoder(layout)}

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        draws = generator(self.place, IDENTITY, step)
        first = self._subjects(draws)
        augment = Augmentation(self.vae, draws)
        views = torch.cat([augment(self.renders.pixels(first)), augment(self.renders.pixels(first + BLOCK - 1))])
        blurred = augment.blurred(views[len(first) :])
        with precision(self.place.device):
            features = self.networks["identity"](torch.cat([views, blurred])).float()
        one, other, soft = features.split([len(first), len(first), len(blurred)])
        logits = one @ other.T * IDENTITY_SCALE
        loss = (contrast(logits, one @ soft.T * IDENTITY_SCALE) + contrast(logits.T)) / 2
        right = (logits.argmax(1) == torch.arange(len(first), device=logits.device)).float().mean()
        return loss, {"right_pair": right}

    def _subjects(self, draws: torch.Generator) -> Tensor:
        """Returns batch_size / 2 different numbers of pictures with a second view, of as few classes as leaves each enough rivals."""
        pairs, wanted = self.renders.pairs, self.batch_size // 2
        nouns = list(pairs)
        count = min(len(nouns), max(2, wanted // SUBJECTS_PER_CLASS))
        chosen = [nouns[number] for number in torch.randperm(len(nouns), generator=draws, device=draws.device)[:count].tolist()]
        parts = [pairs[noun][torch.randperm(len(pairs[noun]), generator=draws, device=draws.device)[: -(-wanted // count)]] for noun in chosen]
        together = torch.cat(parts)
        return together[torch.randperm(len(together), generator=draws, device=draws.device)[:wanted]]

    @torch.no_grad()
    def measure(self, averages: dict[str, nn.Module]) -> tuple[dict[str, float], Image.Image | None]:
        pixels = self.judged.pixels.to(self.place.device)
        names = [f"{subject.class_noun} {subject.seed}" for subject in self.judged.subjects]
        encoder = averages["identity"]
        features, soft = encoder(pixels), encoder(blur(pixels, 1.5))
        areas = same_subject_auc(features, names, [subject.class_noun for subject in self.judged.subjects])
        return {"auc": float(areas.nanmean()), "cosine_to_own_blur": float((features * soft).sum(1).mean())}, None


class CaptionJob(Job):
    """The training of the image and the text encoder: each picture's caption against the others, and against copies with a wrong colour or class."""

    name = "captions"

    def __init__(
        self, recipe: dict[str, Any], layout: Layout, tokenizer: Any, renders: Renders, judged: HeldOut, vae: Any | None, place: Place
    ) -> None:
        self.recipe, self.renders, self.judged, self.place, self.vae = recipe, renders, judged, place, vae
        self.batch_size, self.matrix_lr, self.other_lr = recipe["batch_size"], recipe["matrix_lr"], recipe["other_lr"]
        torch.manual_seed(place.seed + 2)
        encoders = {"image": ImageEncoder(layout), "text": new_text_encoder(layout, tokenizer)}
        self.networks = {**encoders, "scale": LogitScale()}
        device = place.device
        self.tokens = torch.stack([token_ids(tokenizer, [row[kind] for row in renders.rows]) for kind in (3, 4)]).to(device)  # (2, N, L)
        self.judged_tokens = token_ids(tokenizer, judged.captions).to(device)
        self.colors, self.nouns = (
            torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in words], device=device)
            for words in (COLORS, TRAINED_CLASSES)
        )

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        draws = generator(self.place, CAPTIONS, step)
        device = self.place.device
        index = torch.randint(len(self.renders), (self.batch_size,), generator=draws, device=device)
        kind = torch.randint(2, (self.batch_size,), generator=draws, device=device)
        tokens = self.tokens[kind, index]  # (B, L)
        wrong_color, has_color = swap_word(tokens, self.colors, draws)
        wrong_nouns = [swap_word(tokens, self.nouns, draws)[0] for _ in range(WRONG_NOUNS)]
        augment = Augmentation(self.vae, draws)
        pictures = augment(self.renders.pixels(index))
        blurred = augment.blurred(pictures)
        with precision(device):
            seen = self.networks["image"](torch.cat([pictures, blurred])).float()
            read = F.normalize(self.networks["text"](torch.cat([tokens, wrong_color, *wrong_nouns])).text_embeds.float(), dim=-1)
        scale = self.networks["scale"]()
        images, soft = seen.split([len(pictures), len(blurred)])
        texts, *wrong_texts = read.split(len(tokens))
        same = (tokens[:, None] == tokens).all(-1) & ~torch.eye(len(tokens), dtype=torch.bool, device=device)
        logits = (images @ texts.T * scale).masked_fill(same, float("-inf"))
        other_color, *other_nouns = ((images * wrong).sum(1) * scale for wrong in wrong_texts)
        other_color = other_color.masked_fill(~has_color, float("-inf"))
        own_blur = (texts[: len(soft)] * soft).sum(1) * scale
        own_blur = F.pad(own_blur, (0, len(texts) - len(soft)), value=float("-inf"))
        loss = (contrast(logits, torch.stack([other_color, *other_nouns], 1)) + contrast(logits.T, own_blur[:, None])) / 2
        right = (logits.argmax(1) == torch.arange(len(logits), device=device)).float().mean()
        knows = (logits.diagonal() > other_color)[has_color].float().mean()
        return loss, {"right_caption": right, "right_color": knows}

    @torch.no_grad()
    def measure(self, averages: dict[str, nn.Module]) -> tuple[dict[str, float], Image.Image | None]:
        pixels = self.judged.pixels.to(self.place.device)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).tolist()
        images = averages["image"](pixels)
        texts = F.normalize(averages["text"](self.judged_tokens).text_embeds, dim=-1)
        right = caption_retrieval(images[order], texts[order], [self.judged.captions[number] for number in order], min(32, len(order)))
        soft = averages["image"](blur(pixels, 1.5))
        gain = (images * texts).sum(1) - (soft * texts).sum(1)
        figures = {"class_named": float(self._names_class(images, averages["text"]).mean()), "retrieval_of_32": float(right.mean())}
        return figures | {"alignment_lost_to_blur": float(gain.mean())}, None

    def _names_class(self, images: Tensor, text: nn.Module) -> Tensor:
        """Returns for each judged picture whether its caption beats the copies with each other class, (N,) of 0 and 1."""
        is_noun = (self.judged_tokens[..., None] == self.nouns).any(-1)  # (N, L): one place in each caption
        own = (self.judged_tokens[is_noun][:, None] == self.nouns).long().argmax(1)
        scores = []
        for noun in self.nouns:
            texts = F.normalize(text(torch.where(is_noun, noun, self.judged_tokens)).text_embeds, dim=-1)
            scores.append((images * texts).sum(1))
        return (torch.stack(scores, 1).argmax(1) == own).float()


class LogitScale(nn.Module):
    """The learnt factor from cosines to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.7))

    def forward(self) -> Tensor:
        """Returns the factor, at most LARGEST_SCALE."""
        return self.logit_scale.exp().clamp(max=LARGEST_SCALE)


def swap_word(tokens: Tensor, words: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns the captions with one word of a kind (colours, classes) each replaced by another of its kind, and which of them hold one at all.

    Args:
        tokens: (B, L) ids.
        words: (K,) the ids of the words of that kind.
        draws: decides which of a caption's words, and by what.
    """
    is_word = (tokens[..., None] == words).any(-1)  # (B, L)
    lottery = torch.rand(tokens.shape, generator=draws, device=tokens.device) * is_word
    place = lottery.argmax(1, keepdim=True)  # (B, 1)
    old = (tokens.gather(1, place) == words).long().argmax(1, keepdim=True)  # which word it is
    further = torch.randint(1, len(words), old.shape, generator=draws, device=tokens.device)
    new = words[(old + further) % len(words)]
    has_word = is_word.any(1)
    return torch.where(has_word[:, None], tokens.scatter(1, place, new), tokens), has_word

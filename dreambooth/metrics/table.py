"""The one table of the scores: key, title, direction and words of each, for logs, summaries and reports."""

from typing import NamedTuple


class MetricInfo(NamedTuple):
    """One row of the table of scores."""

    key: str  # name in scores.json, after "score/" in a log
    title: str  # name in a report
    direction: str  # "up" or "down": where better is
    sentence: str  # what it says, for a reader who sees it for the first time
    better: str = ""  # what a change to the better means, in a summary
    worse: str = ""  # what a change to the worse means
    column: str = ""  # of the table of images, whose mean over prompts (or class images) the score is
    kind: str = "subject"  # the images that it looks at: "subject", "class" or "other"
    ahead: str = ""  # better than another trained arm, where `better` speaks of the un-tuned base
    behind: str = ""  # worse than another trained arm, where `worse` speaks of the un-tuned base
    is_headline: bool = True  # shown in a summary; the others are further readings of the same thing


PAIRWISE = ("diversity", "identity_diversity", "lpips_diversity")  # columns that are means over pairs of images of one prompt
METRICS = (
    MetricInfo(
        "identity_fidelity",
        "Identity fidelity",
        "up",
        "How much the generated images look like the subject's photos.",
        "the subject was learned",
        "further from the subject than the un-tuned base",
        "identity",
        ahead="more like the subject",
        behind="less like the subject",
    ),
    MetricInfo(
        "identity_fidelity_dinov2",
        "Identity fidelity by DINOv2",
        "up",
        "How much the generated images look like the subject's photos to DINOv2, a second network beside that of identity fidelity.",
        column="identity_dinov2",
        is_headline=False,
    ),
    MetricInfo(
        "image_fidelity",
        "Image fidelity",
        "up",
        "How much the generated images look like the photos to a network that sees what is shown more than whom (CLIP-I).",
        column="image",
        is_headline=False,
    ),
    MetricInfo(
        "masked_identity",
        "Masked identity",
        "up",
        "How much the subject alone, without its surroundings, looks like the subject of the photos.",
        "the subject itself was learned",
        "the subject itself is less like the photos",
        "masked_identity",
        ahead="the subject itself is more like the photos",
    ),
    MetricInfo(
        "prompt_alignment",
        "Prompt alignment",
        "up",
        "How well the generated images show what their prompts say.",
        "prompts are followed better",
        "prompts are followed less",
        "alignment",
    ),
    MetricInfo(
        "prompt_alignment_with_identifier",
        "Prompt alignment, identifier kept",
        "up",
        "How well the generated images show their prompts, with the subject's identifier left in the text.",
        column="alignment_with_identifier",
        is_headline=False,
    ),
    MetricInfo(
        "drift",
        "Drift of the class",
        "down",
        "How much images of the plain class have come to look like the subject.",
        "the class moved away from the subject",
        "the class moved towards the subject",
        "identity",
        "class",
        ahead="the class moved less towards the subject",
        behind="the class moved more towards the subject",
    ),
    MetricInfo("diversity", "Diversity of the subject", "up", "How much images of one prompt differ from each other to the eye.", column="diversity"),
    MetricInfo(
        "class_diversity",
        "Diversity of the class",
        "up",
        "How much images of the plain class differ from each other to the eye.",
        column="diversity",
        kind="class",
    ),
    MetricInfo(
        "class_identity_diversity",
        "Individuals of the class",
        "up",
        "How different the individuals in images of the plain class are; 0 is one and the same.",
        column="identity_diversity",
        kind="class",
        is_headline=False,
    ),
    MetricInfo(
        "lpips_diversity",
        "LPIPS of the subject",
        "up",
        "How much images of one prompt differ from each other, by the perceptual distance of the paper.",
        column="lpips_diversity",
        is_headline=False,
    ),
    MetricInfo(
        "class_lpips_diversity",
        "LPIPS of the class",
        "up",
        "How much images of the plain class differ from each other, by the perceptual distance of the paper.",
        column="lpips_diversity",
        kind="class",
        is_headline=False,
    ),
    MetricInfo(
        "memorisation",
        "Memorisation",
        "down",
        "How much closer the generated images are to a training photo than real photos of the subject are to each other; above 0, they are copies.",
        "further from the photos",
        "nearer to the photos; above 0 they are copied",
        "memorisation",
    ),
    MetricInfo(
        "sharpness",
        "Sharpness",
        "up",
        "How much fine detail the generated images have beside the photos: 1 is as much, less is blurred.",
        "finer detail",
        "softer",
        "sharpness",
    ),
    MetricInfo(
        "true_identity",
        "True identity",
        "up",
        "How many other subjects of the class the images resemble less than the subject, beside true renders (lab only; 0.5 is chance).",
        "the subject itself is drawn",
        "further from the subject itself",
        "true_identity",
        ahead="nearer to the subject itself",
    ),
    MetricInfo(
        "true_identity_margin",
        "True identity, margin",
        "up",
        "How much nearer the images are to true renders of the subject than of others (lab only; 0 is chance).",
        column="true_identity_margin",
        is_headline=False,
    ),
    MetricInfo(
        "true_context",
        "True context",
        "up",
        "How many images show the place that their prompt names rather than any other (lab only).",
        "more images stand in the right place",
        "fewer images stand in the right place",
        "true_context",
    ),
    MetricInfo(
        "other_class_drift",
        "Drift of other classes",
        "down",
        "How much images of other things differ from what the un-tuned base draws.",
        worse="other classes have changed",
        column="other_class_drift",
        kind="other",
        ahead="other classes have changed less",
        behind="other classes have changed more",
    ),
    MetricInfo(
        "other_class_color_drift",
        "Colours of other classes",
        "down",
        "How much of the colour in images of other things has changed from what the un-tuned base draws.",
        worse="other classes have changed their colours",
        column="other_class_color_drift",
        kind="other",
        ahead="other classes have kept more of their colours",
        behind="other classes have kept less of their colours",
    ),
)
TITLES: dict[str, MetricInfo] = {info.key: info for info in METRICS}

"""Names of files that say what is in them."""

import re
from datetime import datetime

from dreambooth.runs import RunFolder


def joepenna_name(run: RunFolder, step: int) -> str:
    """Returns the file name that users of the JoePenna notebook know: when, project, steps, photos, token, class.

    Args:
        run: finished; its group is the project, its start the time (UTC).
        step: that the weights were taken at.
    """
    subject = run.config.subject
    photos = len(list((run.path / "photos").glob("*.png")))  # those held out lie in a folder below
    started = datetime.fromisoformat(run.record["started"]).strftime("%Y-%m-%dT%H-%M-%S")
    project, token, noun = (re.sub(r"[^\w.-]+", "_", word) for word in (run.record["config"]["group"], subject.identifier, subject.class_noun))
    return f"{started}_{project}_{step:05d}_steps_{photos}_training_images_{token}_token_{noun}_class_word.safetensors"

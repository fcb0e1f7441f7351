"""Every shipped experiment runs: its first job, for two steps, on the lab or on a tiny model in Stable Diffusion's place."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from small_runs import ROOT, first_value, make_dreambench, make_photos, run

from dreambooth.final_scores import read_photos

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs_its_first_job(name: str, tiny_folder, tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [f"experiment={name}"], return_hydra_config=True)
    arms = [first_value(f"{key}={values}") for key, values in (cfg.hydra.sweeper.params or {}).items()]
    words = [f"experiment={name}", *arms, "trainer.max_steps=2", "trainer.eval_every=2", f"output_dir={tmp_path}"]
    if cfg.prior.name == "none":
        words.append("prior=none")  # said here too, so that `composed` asks for no class images
    if cfg.data.steps_per_image is not None:
        words.append("data.steps_per_image=null")  # says the same as trainer.max_steps
    if OmegaConf.is_missing(cfg.data, "dreambench"):
        words += [f"base.path={tiny_folder()}", f"data.dreambench={make_dreambench(tmp_path / 'bench', {'backpack': 'backpack'})}"]
    elif OmegaConf.select(cfg, "base.path") != "lab":
        words += [f"base.path={tiny_folder()}", f"data.subject_dir={make_photos(tmp_path / 'photos')}", "subject.class_noun=dog"]
    done = run(*words)
    assert done.status == "done" and done.record["steps"] == 2
    assert done.path.parent.name == name
    assert len(read_photos(done)) >= 3

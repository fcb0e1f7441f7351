"""Stable Diffusion 1 and 2: a choice in the config that loads them, and how such a model encodes prompts and predicts."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth.base import hub
from dreambooth.base.files import SingleFile, check_folder, files_digest, model_files, read_json, read_single_file
from dreambooth.base.protocol import PREDICTION_TYPES, BaseModel, native_resolution, quiet
from dreambooth.errors import ConfigError, UserError

LAB_FOLDER = Path(__file__).resolve().parents[1] / "lab" / "weights" / "base"
SUFFIXES = (".safetensors", ".ckpt")
SD1_LAYOUT = ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512)  # hub id with the configs, native resolution in px
SD2_LAYOUT = ("stabilityai/stable-diffusion-2-base", 512)
SD2_V_LAYOUT = ("stabilityai/stable-diffusion-2-1", 768)


@dataclass(slots=True)
class StableDiffusion:
    """A Stable Diffusion 1 or 2 model: the built-in lab's, a diffusers folder, a model of the hub, or a single LDM file.

    The network is asked only for a hub id that the local cache does not hold, and never when HF_HUB_OFFLINE is set.
    """

    name: str = "stable_diffusion"
    path: str = "lab"  # "lab" (the built-in model), a diffusers folder, a hub id "owner/name", or a .safetensors / .ckpt file
    revision: str | None = None  # branch, tag or commit of a hub id; None: its default branch
    variant: str | None = None  # "fp16" for weights named *.fp16.safetensors; None: plain names
    config_path: str | None = None  # single file only: diffusers folder or hub id with its layout and tokenizer; None: guessed
    prediction_type: str | None = None  # epsilon, v_prediction or sample; None: as the model's own files say

    def __post_init__(self) -> None:
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            raise ConfigError("base.prediction_type", f"must be one of {', '.join(PREDICTION_TYPES)}", self.prediction_type)
        if not self.path:
            raise ConfigError("base.path", "must not be empty", self.path, "name a folder, a hub id, a file, or lab")

    def check(self) -> None:
        """Reads configs and headers, so that a model that cannot be used is refused in a moment and not after minutes.

        Raises:
            UserError: one sentence that starts with the config path at fault.
        """
        if self._is_file():
            self._layout()
            return
        if self.config_path is not None:
            raise UserError("base.config_path", "must be null unless base.path is a single file", self.config_path, "leave it out")
        folder = self._folder()
        if folder is not None:
            check_folder(folder, self.variant)
        elif hub.is_offline():
            self.locate()  # raises: there is nothing to find

    def is_lab(self) -> bool:
        """Tells whether the model is one of the built-in world (its folder holds lab.json), whose ground truth is known."""
        folder = None if self._is_file() else self._folder()
        return folder is not None and (folder / "lab.json").is_file()

    def locate(self) -> Path:
        """Returns the local folder or file of the model; a hub id is downloaded when the cache does not hold it.

        Raises:
            UserError: there is no such model, or no way to get it.
        """
        if self._is_file():
            return Path(self.path).expanduser()
        return self._folder() or hub.fetch(self.path, self.revision, self.variant)

    def digest(self) -> str:
        """Returns a sha256 in hex over the files of the configs, the tokenizer and the weights, wherever they lie.

        It reads every byte of the weights: some seconds for a model of gigabytes, except in the hub's cache, which knows its digests.
        """
        if not self._is_file():
            folder = self.locate()
            return files_digest({file.relative_to(folder).as_posix(): file for file in model_files(folder, self.variant)})
        layout = self._layout()
        configs = {file.relative_to(layout).as_posix(): file for file in model_files(layout, weights=False)}
        return files_digest({"single file": self.locate(), **configs})

    def native_resolution(self) -> int:
        """Returns the side in px of the images that the model was made for, from the configs alone."""
        if self._is_file() and self.config_path is None:
            return self._guessed_layout(read_single_file(self.locate()))[1]
        folder = self._layout() if self._is_file() else self._folder() or hub.fetch(self.path, self.revision, None, weights=False)
        unet, vae = (read_json(folder / part / "config.json", "base.path") for part in ("unet", "vae"))
        return native_resolution(unet, vae)

    def load(self, dtype: torch.dtype = torch.float32) -> "StableDiffusionModel":
        """Returns the model, frozen, in eval mode, on the CPU.

        Args:
            dtype: of all weights.

        Raises:
            UserError: it cannot be used (see `check`), or its weights do not fit its configs.
        """
        self.check()
        path, told = self.locate(), self.prediction_type
        if path.is_file():
            told = told or read_single_file(path).prediction_type
            parts = _load_single_file(path, self._layout(), dtype)
        else:
            check_folder(path, self.variant)  # again, for what has only now been downloaded
            parts = _load_folder(path, self.variant, dtype)
        tokenizer, config = parts["tokenizer"], parts["text_encoder"].config
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)  # some folders do not say it
        model = StableDiffusionModel(**parts)
        model.prediction_type = told or model.prediction_type
        return model

    def load_tokenizer(self) -> Any:
        """Returns the tokenizer alone, just as `load` gives it, in a moment; of a hub id only the small files are downloaded."""
        with quiet():
            from transformers import CLIPTokenizer

        folder = self._layout() if self._is_file() else self._folder() or hub.fetch(self.path, self.revision, None, weights=False)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
        length = read_json(folder / "text_encoder" / "config.json", "base.path")["max_position_embeddings"]
        tokenizer.model_max_length = min(tokenizer.model_max_length, length)
        return tokenizer

    def _is_file(self) -> bool:
        """Tells whether `path` is a single file; refuses what is neither that, nor a folder, nor a hub id."""
        path = Path(self.path).expanduser()
        if self.path == "lab" or path.is_dir():
            return False
        if path.is_file() and path.suffix in SUFFIXES:
            return True
        if path.exists() or path.suffix in SUFFIXES or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.path):
            rule = "must be lab, an existing diffusers folder, a hub id (owner/name), or an existing .safetensors or .ckpt file"
            raise UserError("base.path", rule, self.path, "check the path")
        return False

    def _folder(self) -> Path | None:
        """Returns the folder of a model that is no single file; None for a hub id that is not in the cache."""
        path = LAB_FOLDER if self.path == "lab" else Path(self.path).expanduser()
        return path if self.path == "lab" or path.is_dir() else hub.cached(self.path, self.revision, self.variant)

    def _guessed_layout(self, single: SingleFile) -> tuple[str, int]:
        """Returns the hub id with the layout of a single file, and its resolution in px."""
        if single.family == "sd1":
            return SD1_LAYOUT
        told = self.prediction_type or single.prediction_type
        if told is None:
            rule = "must be given for a Stable Diffusion 2 single file, which does not record it"
            next_step = "set v_prediction (768 px models) or epsilon (512 px models), or name base.config_path"
            raise UserError("base.prediction_type", rule, next_step=next_step)
        return SD2_V_LAYOUT if told == "v_prediction" else SD2_LAYOUT

    def _layout(self) -> Path:
        """Returns the folder with the configs and the tokenizer of a single file, checked against the file."""
        path, where = self.locate(), "base.config_path"
        single = read_single_file(path)
        source = self.config_path or self._guessed_layout(single)[0]
        folder = LAB_FOLDER if source == "lab" else Path(source).expanduser()
        if not folder.is_dir():
            folder = hub.fetch(source, None, None, weights=False, where=where)
        check_folder(folder, weights=False, where=where)
        width = read_json(folder / "unet" / "config.json", where).get("cross_attention_dim")
        if width != single.cross_width:
            rule = f"must have the layout of {path}, whose text is {single.cross_width} wide"
            raise UserError(where, rule, width, "name a folder of the same family")
        return folder


class StableDiffusionModel(BaseModel):
    """Stable Diffusion 1 (CLIP text) and 2 (OpenCLIP text, read one layer early: its folders ship 23 of 24 layers)."""

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        token_ids = self.tokenize(prompts).to(next(self.text_encoder.parameters()).device)
        return self.text_encoder(token_ids)[0]  # (B, L, D)

    def predict(self, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        dtype = self.unet.dtype
        return self.unet(noisy.to(dtype), t, encoder_hidden_states=text.to(dtype)).sample

    def pipeline(self, scheduler: Any | None = None) -> Any:
        with quiet():
            from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=scheduler or self.new_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _finish_folder(self, folder: Path) -> None:
        """Gives the text encoder and the tokenizer the names that tools built on transformers 4 read, as version 5 does too."""
        from safetensors.torch import save_file

        state = self.text_encoder.state_dict()
        tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor.cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
        words = self.tokenizer.backend_tokenizer
        words.no_padding()  # a setting of the last call, which would make the file depend on it
        words.no_truncation()
        words.save(str(folder / "tokenizer" / "tokenizer.json"))
        words.model.save(str(folder / "tokenizer"))


def _load_folder(folder: Path, variant: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the parts of a diffusers folder by their names in `BaseModel`; no weight is left to chance."""
    with quiet():
        import diffusers
        from transformers import CLIPTextModel, CLIPTokenizer

        kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL, "text_encoder": CLIPTextModel}
        options = {"dtype": dtype, "variant": variant, "local_files_only": True, "output_loading_info": True}
        parts = {}
        for part, kind in kinds.items():
            try:
                parts[part], info = kind.from_pretrained(folder, subfolder=part, **options)
            except (ValueError, RuntimeError, OSError) as error:
                reason = str(error).strip().split("\n")[0]
                rule = f"must hold weights that fit their configs, but {folder / part} does not load ({reason})"
                raise UserError("base.path", rule, next_step="copy or download the model again") from error
            if info["missing_keys"]:
                rule = f"must hold all weights of the {part}, but {folder} lacks {len(info['missing_keys'])} of them"
                raise UserError("base.path", rule, sorted(info["missing_keys"])[0], "copy or download the model again")
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "base.path").get("_class_name", "DDPMScheduler")
        parts["scheduler"] = getattr(diffusers, scheduler).from_pretrained(folder, subfolder="scheduler", local_files_only=True)
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    return parts


def _load_single_file(path: Path, layout: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the parts of an LDM file by their names in `BaseModel`; `layout` gives the configs and the tokenizer."""
    with quiet():
        from diffusers import StableDiffusionPipeline

        absent = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        try:
            pipeline = StableDiffusionPipeline.from_single_file(
                str(path), config=str(layout), dtype=dtype, local_files_only=True, requires_safety_checker=False, **absent
            )
        except (ValueError, RuntimeError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            rule = f"must have the layout of {path}, but {layout} does not fit it ({reason})"
            raise UserError("base.config_path", rule, next_step="name a folder of the same model") from error
    parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "vae", "tokenizer", "scheduler")}
    for part in ("unet", "text_encoder", "vae"):
        lost = [name for name, parameter in parts[part].named_parameters() if parameter.is_meta]
        if lost:
            rule = f"must hold all weights of the {part}, but {path} lacks {len(lost)} of them"
            raise UserError("base.path", rule, lost[0], "name a full checkpoint")
    return parts

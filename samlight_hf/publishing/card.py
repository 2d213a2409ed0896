"""Model cards: the template model_card.md, filled from a checkpoint's config, its training and its evaluation.

Facts that no program writes, such as the terms of the training data, come from a `card.yaml` beside the weights
(`CardFacts`).
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open
from transformers import PreTrainedConfig, SamConfig

from ..conversion.original import ORIGINAL_SUFFIXES
from ..loading import DTYPES, LOADING_ERRORS, load_model, weight_files, weights_fingerprint
from ..modeling.configuration_sam_lightening import SamLighteningConfig
from ..utils.atomic_files import read_yaml
from ..utils.json_files import read_json
from ..utils.messages import one_line
from .card_tables import (
    Rows,
    architecture_rows,
    evaluation_results,
    evaluation_section,
    markdown_table,
    speed_section,
    training_rows,
)
from .checks import FolderError, as_folder_errors, check_text, without_absolute_paths


TEMPLATE = Path(__file__).with_name("model_card.md")  # a copy of the repository's, part of the package
FACTS_NAME, EVALUATION_NAME, TRAINING_NAME = "card.yaml", "evaluation.json", "training.json"
_KEYS = {"training_data": ("name", "terms", "id"), "evaluation": ("name", "id", "split", "note")}
_TYPES: dict[str, type | tuple[type, ...]] = {  # other facts are texts
    "training_data": list,
    "tags": list,
    "evaluation": dict,
    "thresholds": dict,
    "base_model": (str, list),
}

CITATION = """\
@article{song2024samlightening,
  title   = {SAM-Lightening: A Lightweight Segment Anything Model with Dilated Flash Attention to \
Achieve 30 times Acceleration},
  author  = {Song, Yanfei and Pu, Bangzheng and Wang, Peng and Jiang, Hongxu and Dong, Dong and Cao, Yongxiang and
             Shen, Yiqing},
  journal = {arXiv preprint arXiv:2403.09195},
  year    = {2024}
}"""
SAM_CITATION = """\
@article{kirillov2023segment,
  title   = {Segment Anything},
  author  = {Kirillov, Alexander and Mintun, Eric and Ravi, Nikhila and Mao, Hanzi and Rolland, Chloe and
             Gustafson, Laura and Xiao, Tete and Whitehead, Spencer and Berg, Alexander C. and Lo, Wan-Yen and
             Doll{\\'a}r, Piotr and Girshick, Ross},
  journal = {arXiv preprint arXiv:2304.02643},
  year    = {2023}
}"""


@dataclasses.dataclass
class CardFacts:
    """Facts of a card that no other file holds. All are optional; texts are Markdown.

    Attributes:
        name: Name of the model.
        summary: One or two sentences on what it is good for.
        license: Licence of the weights, which follows from the data and the teacher, by its name on the Hub
            ("apache-2.0"), or "other" together with a `license_name`.
        license_name: Name of a licence that the Hub does not know.
        license_link: Address of that licence.
        base_model: Hub name of the teacher, or of several.
        training: Description of the training.
        training_data: Mappings with `name`, `terms` and, for a dataset of the Hub, `id`.
        terms: Further terms of use.
        limits: List of limits.
        evaluation: `name`, `id`, `split` and `note` of the evaluated images.
        thresholds: Arguments of the mask-generation pipeline that suit this model.
        thresholds_reason: Reason for the thresholds.
        tags: Further tags on the Hub.
    """

    name: str | None = None
    summary: str = ""
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | list[str] | None = None
    training: str = ""
    training_data: list[dict] = dataclasses.field(default_factory=list)
    terms: str = ""
    limits: str = ""
    evaluation: dict = dataclasses.field(default_factory=dict)
    thresholds: dict = dataclasses.field(default_factory=dict)
    thresholds_reason: str = ""
    tags: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "CardFacts":
        """Read the folder's card.yaml, or return empty facts where there is none.

        Raises:
            ValueError: For a file that cannot be read or has other content.
        """
        path = Path(folder) / FACTS_NAME
        if not path.is_file():
            return cls()
        return cls.of(read_yaml(path) or {}, str(path))

    @classmethod
    def of(cls, content: Mapping, where: str = "facts") -> "CardFacts":
        """Create facts from a mapping. `where` names its source in messages.

        Raises:
            ValueError: For an unknown key, and for a value of another type.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{where}: must hold keys and values, such as name: My student.")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key, value in content.items():
            if key not in fields:
                raise ValueError(f"{where}: {key!r} is not known. Use some of {', '.join(fields)}.")
            if not isinstance(value, _TYPES.get(key, str)):
                raise ValueError(
                    f"{where}: {key} is a {type(value).__name__}, which it cannot be. See docs/publishing.md."
                )
        values: dict[str, Any] = {k: value.strip() if isinstance(value, str) else value for k, value in content.items()}
        facts = cls(**values)
        if not all(isinstance(row, Mapping) and row.get("name") for row in facts.training_data):
            raise ValueError(f"{where}: each of training_data needs a name, and should have terms.")
        for row in facts.training_data:
            _check_texts(row, "training_data", where)
        _check_texts(facts.evaluation, "evaluation", where)
        return facts


def _check_texts(facts: Mapping, name: str, where: str):
    """Raise ValueError for an unknown key of training_data or evaluation, and for a value that is not a text."""
    for key, value in facts.items():
        if key not in _KEYS[name]:
            raise ValueError(f"{where}: {key!r} of {name} is not known. Use some of {', '.join(_KEYS[name])}.")
        if not (value is None or isinstance(value, str)):
            raise ValueError(f"{where}: {key} of {name} is {value!r}, which is no text. Put it in quotes.")


def render_card(
    folder: str | os.PathLike,
    *,
    evaluation: str | os.PathLike | Mapping | None = None,
    training: str | os.PathLike | Mapping | Sequence | None = None,
    benchmark: str | os.PathLike | Mapping | None = None,
    facts: CardFacts | None = None,
    step: int | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
) -> str:
    """Render the README.md of a checkpoint's folder: metadata for the Hub, and the sections of model_card.md.

    Runs no model and does not use the network. The card says so where a part is not known.

    Args:
        folder: Folder of the checkpoint.
        evaluation: Report of `samlight evaluate`: path of report.json, or its content. Default: evaluation.json in the
            folder, if there is one.
        training: Settings and results of a distillation (`training_rows`): path, content, or several of them. Default:
            training.json in the folder, if there is one.
        benchmark: Output of benchmarks/run.py: path of the JSON, or its content.
        facts: Facts that no other file holds. Default: card.yaml in the folder, if there is one.
        step: Training step, for a card of an intermediate checkpoint.
        repo_id: Repository from which the card's examples load. Default: the folder.
        revision: Revision for the examples.

    Returns:
        The text of the card, without absolute paths.

    Raises:
        ValueError: For files that cannot be read or have other content, and for texts that hold a secret.
    """
    folder = Path(folder)
    config = _read_config(folder)
    facts = CardFacts.read(folder) if facts is None else facts
    training_content = _content(training if training is not None else _beside(folder, TRAINING_NAME))
    stages = training_rows(training_content)
    if facts.base_model is None and (teacher := _teacher(training_content)):
        facts = dataclasses.replace(facts, base_model=teacher)
    name = facts.name or (repo_id or folder.resolve().name).split("/")[-1]
    report = _content(evaluation if evaluation is not None else _beside(folder, EVALUATION_NAME))
    section = None
    if report is not None:
        # `samlight evaluate` tells folders of one name apart by their parents: a/student, b/student.
        parts = folder.resolve().parts[1:]
        names = ["/".join(parts[start:]) for start in reversed(range(len(parts)))]
        section = evaluation_section(report, facts.evaluation, [*names, name], partial(_fingerprint, folder))
    has_code = isinstance(config, SamLighteningConfig)
    speed_rows, speed_source = speed_section(section, _content(benchmark), config)
    card = ModelCard.from_template(
        _metadata(facts, name, section, has_code),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        facts=facts,
        base_model=_linked(facts.base_model),
        step=None if step is None else f"{step:,}",
        last_step=_last_step(stages),
        stage=stages[0][-1] if stages and stages[0][-1] != "value" else None,
        has_code=has_code,
        architecture_table=markdown_table(architecture_rows(config, *_weights(folder))),
        location=repo_id or (folder.as_posix() if not folder.is_absolute() else folder.name),
        is_repository=repo_id is not None,
        revision=revision,
        loading_arguments=(f', revision="{revision}"' if revision else "") + ", trust_remote_code=True" * has_code,
        threshold_arguments="".join(f", {key}={value!r}" for key, value in facts.thresholds.items()),
        evaluation=section,
        data_table=markdown_table(_data_rows(facts)),
        training_table=markdown_table(stages),
        terms=_terms(facts, has_code),
        image_size=f"{config.vision_config.image_size:,}",
        speed_table=markdown_table(speed_rows),
        speed_source=speed_source,
        citation=(CITATION + "\n\n") * has_code + SAM_CITATION,
    )  # fmt: skip
    text = re.sub(r"\n{3,}", "\n\n", without_absolute_paths(str(card))).rstrip() + "\n"
    check_text("the card", text)
    return text


def _metadata(facts: CardFacts, name: str, section: Mapping | None, has_code: bool) -> ModelCardData:
    datasets = [row["id"] for row in facts.training_data if row.get("id")]
    return ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="transformers",
        pipeline_tag="mask-generation",
        base_model=facts.base_model,
        datasets=datasets or None,
        tags=["segment-anything", *["sam-lightening"] * has_code, "image-segmentation", *facts.tags],
        model_name=name,
        eval_results=evaluation_results(section) if section else None,
    )


def _data_rows(facts: CardFacts) -> Rows:
    return [["data", "terms"], *([data["name"], data.get("terms") or "not stated"] for data in facts.training_data)]


def _terms(facts: CardFacts, has_code: bool) -> str:
    name = f"{facts.license} ({facts.license_name})" if facts.license_name else facts.license
    name = f"[{name}]({facts.license_link})" if facts.license_link else name
    lines = [
        f"Licence of the weights: {name}."
        if name
        else "The licence of the weights has not been stated: ask before you use them."
    ]
    lines += [facts.terms] if facts.terms else []
    lines += ["The code beside the weights is Apache-2.0 (`LICENSE`)."] if has_code else []
    return "\n".join(lines)


def _linked(base_model: str | list[str] | None) -> str:
    names = [base_model] if isinstance(base_model, str) else base_model or []
    return ", ".join(f"[{name}](https://huggingface.co/{name})" for name in names)


def _last_step(stages: Sequence[Sequence[str]]) -> str | None:
    last = next((row[-1] for row in stages if row[0] == "max_steps"), "")
    return f"{int(last):,}" if last.isdecimal() else None


def _teacher(training) -> str | None:
    """Return the teacher's Hub name, where the training names one."""
    teacher = training.get("teacher") if isinstance(training, Mapping) else None
    if (
        not isinstance(teacher, str)
        or teacher.count("/") != 1
        or teacher.endswith(ORIGINAL_SUFFIXES)
        or Path(teacher).exists()
    ):
        return None
    try:
        validate_repo_id(teacher)
    except HFValidationError:
        return None
    return teacher


def _read_config(folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        reason = "no checkpoint's folder: it has no config.json" if folder.is_dir() else "no such folder"
        raise FolderError(f"{folder}: {reason}.")
    try:
        model_type = read_json(path, dict).get("model_type")
        classes = {kind.model_type: kind for kind in (SamLighteningConfig, SamConfig)}
        if model_type not in classes:
            raise FolderError(f"{path}: model_type={model_type!r} must be one of {', '.join(classes)}.")
        return classes[model_type].from_pretrained(folder)
    except FolderError:
        raise
    except LOADING_ERRORS as error:
        raise FolderError(f"{path}: cannot be read ({one_line(error, 200)}).") from error


def _weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], set[str], int]:
    """Return shapes by name, dtypes, and file size in bytes of the weights, from the headers of their files."""
    with as_folder_errors():
        paths = weight_files(folder)
    shapes, dtypes, num_bytes = {}, set(), sum(path.stat().st_size for path in paths)
    try:
        for path in paths:
            with safe_open(path, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118  no mapping
                    part = weights.get_slice(key)
                    shapes[key] = tuple(part.get_shape())
                    dtypes.add(part.get_dtype())
    except LOADING_ERRORS as error:
        raise FolderError(
            f"{folder}: weights are damaged ({one_line(error, 200)}). Copy or download them again."
        ) from error
    return shapes, dtypes, num_bytes


def _fingerprint(folder: Path, dtype: str) -> str | None:
    """Return the fingerprint of the weights in a dtype, as `samlight evaluate` reports it; None in an unknown dtype."""
    if dtype not in DTYPES:
        return None
    with as_folder_errors():
        model, _ = load_model(folder, "cpu", dtype)
    return weights_fingerprint(model)


def _beside(folder: Path, name: str) -> Path | None:
    return folder / name if (folder / name).is_file() else None


def _content(source):
    """Read the JSON object of a file, or of each file of a sequence; return a mapping unchanged."""
    if source is None or isinstance(source, Mapping):
        return source
    if isinstance(source, Sequence) and not isinstance(source, str):
        return [_content(item) for item in source]
    return read_json(source, dict)

"""Everything that may be wrong with ``hf:``: exit status 2, one message, and what to do about it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
import transformers as tf
from command import mmedge
from datasets import ClassLabel, Dataset, DatasetDict, load_from_disk
from hf_models import COLOURS, made
from safetensors.torch import load_file, save_file

from mmedge.errors import TaskError, UsageError
from mmedge.loading import load_task
from mmedge.tasks.hf.checkpoint import quiet
from mmedge.tasks.hf.options import Options, parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good models ``vit``, ``bert``, ``whisper`` and ``vilt``, each with its data."""
    folder = tmp_path_factory.mktemp("hf")
    for name in ("vit", "bert", "whisper", "vilt"):
        made(name, folder)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of them to damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def refused(spec: str, *said: str) -> None:
    with pytest.raises((TaskError, UsageError)) as error:
        load_task(spec, {})
    text = str(error.value)
    assert error.value.exit_status == 2
    assert error.value.fix, text
    for words in said:
        assert words in text


def edited(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**{k: v for k, v in config.items() if changes.get(k, 0) is not None}, **changes}))


# --- through the command line


CASES: dict[str, tuple[Callable[[Path], Any], str, tuple[str, ...]]] = {
    "no config": (lambda at: (at / "vit/config.json").unlink(), "vit", ("no config.json", "save_pretrained")),
    "damaged config": (lambda at: (at / "vit/config.json").write_text("{"), "vit", ("damaged", "copy it again")),
    "no data": (lambda at: None, "vit:batch=2", ("no data", "image, label", "data=DIRECTORY", "loader=")),
    "other family": (
        lambda at: edited(at / "bert/config.json", architectures=["BertForMaskedLM"]),
        "bert",
        ("BertForMaskedLM", "supported: image classification", "clip", "vilt", "vision-encoder-decoder", "whisper"),
    ),
    "pickled": (
        lambda at: (at / "vit/model.safetensors").rename(at / "vit/pytorch_model.bin"),
        "vit",
        ("pickled", "safe_serialization=True"),
    ),
    "no processor": (
        lambda at: (at / "vit/preprocessor_config.json").unlink(),
        "vit",
        ("image processor", "AutoImageProcessor", "save_pretrained"),
    ),
    "no weights": (lambda at: (at / "vit/model.safetensors").unlink(), "vit", ("no weights",)),
}


@pytest.mark.parametrize(("damage", "model", "said"), CASES.values(), ids=CASES)
def test_the_command_says_what_is_wrong(copy, monkeypatch, capsys, damage, model, said) -> None:
    damage(copy)
    spec = f"hf:{copy / model}" + ("" if ":" in model else f":data={copy / model}-data")
    outcome = mmedge(monkeypatch, capsys, "task", "check", spec)
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.count("error:") == 1
    assert "Traceback" not in outcome.err
    for words in said:
        assert words in outcome.err


def test_a_good_task_is_checked(folder, monkeypatch, capfd) -> None:
    outcome = mmedge(monkeypatch, capfd, "task", "check", "-q", f"hf:{folder / 'vit'}:data={folder / 'vit-data'}")
    assert (outcome.status, outcome.out, outcome.err) == (
        0,
        "hf_vit: good (test 40, calibration 24, train 72 samples)\n",
        "",
    )


# --- specifications


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ("", "no model is named"),
        ("vit:dta=x", "did you mean 'data'"),
        ("vit:data=a,data=b", "given twice"),
        ("vit:data=a,loader=b.py:f", "exclude each other"),
        ("vit:length=many", "length"),
        ("vit:length=1", "length"),
        ("vit:batch=0", "batch"),
        ("vit:download=perhaps", "download"),
    ],
)
def test_a_specification_is_checked(about, said) -> None:
    with pytest.raises(UsageError, match=said):
        parse(about)


def test_a_specification_may_hold_colons_and_commas() -> None:
    place, options = parse("a/b:loader=some,where/my.py:batches,length=12,download=yes")
    assert place == "a/b"
    assert options == Options(loader="some,where/my.py:batches", length=12, download=True)
    assert parse("./with:colon") == ("./with:colon", Options())


def test_without_the_extra_it_is_named(monkeypatch, folder) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(f"hf:{folder / 'vit'}:data=x", 'pip install "mmedge[hf]"', "transformers")


def test_an_id_that_is_not_here_is_not_fetched(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("hf:someone/some-model:data=x", "local cache", "hf:someone/some-model:download=yes", "local directory")
    refused("hf:./nowhere:data=x", "no such directory")
    refused("hf:some/where/else:data=x", "no such directory")
    (tmp_path / "file").touch()
    refused(f"hf:{tmp_path / 'file'}:data=x", "is a file")


# --- models


def test_weights_that_are_not_there_are_not_made_up(copy) -> None:
    with quiet():
        tf.ViTModel(tf.ViTConfig(**hf_models.VISION)).save_pretrained(copy / "base")
    shutil.copy(copy / "base/model.safetensors", copy / "vit/model.safetensors")
    refused(f"hf:{copy / 'vit'}:data={copy / 'vit-data'}", "no weights for classifier", "random")


def test_weights_that_the_config_gives_no_place_are_not_left_out_in_silence(copy) -> None:
    edited(copy / "vit/config.json", num_hidden_layers=1)
    refused(f"hf:{copy / 'vit'}:data={copy / 'vit-data'}", "no place: vit.encoder.layer.1.", "config.json that of")
    edited(copy / "vit/config.json", num_hidden_layers=2, qkv_bias=False)
    refused(f"hf:{copy / 'vit'}:data={copy / 'vit-data'}", "no place: vit.encoder.layer.0.attention.attention.key.bias")


def test_weights_of_another_head_do_no_harm(copy) -> None:
    weights = copy / "vit/model.safetensors"
    extra = {"vit.pooler.dense.weight": torch.ones(2, 2), "vit.embeddings.position_ids": torch.arange(3)}
    save_file({**load_file(weights), **extra}, weights, metadata={"format": "pt"})
    assert load_task(f"hf:{copy / 'vit'}:data={copy / 'vit-data'}", {}).model is not None


def _truncated(at: Path) -> None:
    path = at / "vit/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _without_a_shard(at: Path) -> None:
    with quiet():
        model = tf.ViTForImageClassification.from_pretrained(at / "vit")
        (at / "vit/model.safetensors").unlink()
        model.save_pretrained(at / "vit", max_shard_size="100KB")
    sorted((at / "vit").glob("model-*.safetensors"))[1].unlink()


def _of_another(at: Path) -> None:
    shutil.copy(at / "bert/model.safetensors", at / "vit/model.safetensors")


def _wider_config(at: Path) -> None:
    edited(at / "vit/config.json", hidden_size=96)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncated, "incomplete"),
        (_without_a_shard, "model-00002-of-0000"),
        (_of_another, "cannot be loaded"),
        (_wider_config, "size mismatch for"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_a_way_out(copy, damage, said) -> None:
    damage(copy)
    refused(f"hf:{copy / 'vit'}:data={copy / 'vit-data'}", said, "both must be of one model")


def test_code_that_comes_with_a_model_is_not_run(copy) -> None:
    (copy / "vit/own.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\n")
    own = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
    edited(copy / "vit/config.json", auto_map=own, model_type="own")
    refused(f"hf:{copy / 'vit'}:data={copy / 'vit-data'}", "custom code", "never run", "mmedge task new")
    assert not (copy / "ran").exists()


def test_a_start_token_beyond_the_vocabulary_is_refused(copy) -> None:
    """transformers fills in that of the published models where the file has none."""
    edited(copy / "whisper/config.json", decoder_start_token_id=50257)
    refused(f"hf:{copy / 'whisper'}:data={copy / 'whisper-data'}", "decoder_start_token_id is 50257", "48 tokens")


def test_a_tokenizer_of_another_model_is_refused(copy) -> None:
    with quiet():
        config = tf.BertConfig(**{**hf_models.TEXT, "vocab_size": 8}, **hf_models.LABELS)
        tf.BertForSequenceClassification(config).save_pretrained(copy / "bert")
    refused(f"hf:{copy / 'bert'}:data={copy / 'bert-data'}", "the model has 8 tokens", "trained with")


def test_damaged_weights_and_configs_are_found(copy) -> None:
    data = f"data={copy / 'vit-data'}"
    (copy / "vit/model.safetensors").write_bytes(b"nonsense")
    refused(f"hf:{copy / 'vit'}:{data}", "cannot be loaded")
    for changes in ({"architectures": None}, {"architectures": []}, {"architectures": ["MyOwnModel"]}):
        edited(copy / "vit/config.json", **changes)
        refused(
            f"hf:{copy / 'vit'}:{data}", "architecture" if changes != {"architectures": ["MyOwnModel"]} else "MyOwn"
        )
    edited(copy / "vit/config.json", architectures=["ViTForImageClassification"], model_type="my-own")
    refused(f"hf:{copy / 'vit'}:{data}", "my-own", "mmedge task new")


def test_other_problems_than_one_class_of_several_are_refused(copy) -> None:
    edited(copy / "bert/config.json", problem_type="multi_label_classification")
    refused(f"hf:{copy / 'bert'}:data={copy / 'bert-data'}", "multi_label_classification")
    with quiet():
        config = tf.BertConfig(**hf_models.TEXT, num_labels=1)
        tf.BertForSequenceClassification(config).save_pretrained(copy / "bert")
    refused(f"hf:{copy / 'bert'}:data={copy / 'bert-data'}", "single value")


def test_parts_without_an_onnx_configuration_are_refused(copy) -> None:
    """Every encoder-decoder is of one type; optimum knows only some of the parts."""
    with quiet(), torch.no_grad():
        decoder = tf.BertConfig(**hf_models.TEXT, is_decoder=True, add_cross_attention=True)
        encoder = tf.ViTMSNConfig(**hf_models.VISION)
        config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        config.decoder.model_type, config.architectures = "xlnet", ["VisionEncoderDecoderModel"]
        config.save_pretrained(copy / "odd")
    with pytest.raises(TaskError) as error:
        load_task(f"hf:{copy / 'odd'}:data={copy / 'vit-data'}", {})
    assert error.value.exit_status == 2


# --- data


def saved(data: Any, path: Path) -> str:
    with quiet():
        data.save_to_disk(str(path))
    return f"data={path}"


def test_columns_must_be_there(folder, tmp_path) -> None:
    whole = load_from_disk(str(folder / "vit-data"))
    model = f"hf:{folder / 'vit'}"
    refused(f"{model}:{saved(whole.remove_columns('label'), tmp_path / '1')}", "no column holds the label", "label=")
    refused(f"{model}:{saved(whole.remove_columns('image'), tmp_path / '2')}", "no column holds the image", "image=")
    refused(f"{model}:data={folder / 'vit-data'},image=picture", "unknown column 'picture'", "image")
    with pytest.raises(TaskError, match="no image"):
        load_task(f"{model}:data={folder / 'vit-data'},image=label", {})
    several = {"first": ["a b"] * 20, "second": ["b a"] * 20, "label": [0] * 20}
    spec = f"hf:{folder / 'bert'}:{saved(Dataset.from_dict(several), tmp_path / '3')}"
    refused(spec, "several columns may be the text", "first, second")
    assert load_task(f"{spec},text=second,text_pair=first", {}).example().inputs["token_type_ids"].any()


@pytest.mark.parametrize("label", [4, -1, "violet"])
def test_labels_must_be_the_models(folder, tmp_path, label) -> None:
    data = saved(Dataset.from_dict({"text": ["a"] * 20, "label": [label] * 20}), tmp_path / "data")
    refused(f"hf:{folder / 'bert'}:{data}", repr(label), "'label'", "red, green, blue, white")


def test_class_names_that_are_not_the_models_are_refused(folder, tmp_path) -> None:
    rows = Dataset.from_dict({"text": ["a"] * 20, "label": [1] * 20})
    strange = rows.cast_column("label", ClassLabel(names=["cat", "dog"]))
    refused(f"hf:{folder / 'bert'}:{saved(strange, tmp_path / '1')}", "'dog'", "red, green, blue, white")
    turned = rows.cast_column("label", ClassLabel(names=["Blue", "Red"]))
    targets = load_task(f"hf:{folder / 'bert'}:{saved(turned, tmp_path / '2')}", {}).example().targets
    assert set(targets) == {list(COLOURS).index("red")}


def test_data_must_be_there_and_enough(folder, tmp_path) -> None:
    model = f"hf:{folder / 'bert'}"
    refused(f"{model}:data={tmp_path / 'nowhere'}", "no such directory")
    (tmp_path / "empty").mkdir()
    refused(f"{model}:data={tmp_path / 'empty'}", "holds no data set")
    one = DatasetDict({"train": Dataset.from_dict({"text": ["a"], "label": [0]})})
    refused(f"{model}:{saved(one, tmp_path / 'one')}", "too few")
    refused(f"{model}:data={folder / 'bert-data'},train=training", "unknown split 'training'")
    refused(f"{model}:data={folder / 'bert-data'},length=600", "takes 16 tokens")
    (tmp_path / "one" / "dataset_dict.json").write_text("{")
    with pytest.raises(TaskError, match="cannot be read"):
        load_task(f"{model}:data={tmp_path / 'one'}", {})


def images(folder: Path, tmp_path: Path, made: str) -> str:
    """A task whose loader gives images made by an expression of ``i`` and ``r``, a generator of random numbers."""
    (tmp_path / "own.py").write_text(
        "import numpy as np\nfrom PIL import Image\n\ndef batches(split, seed):\n"
        "    r = np.random.default_rng([len(split), seed if split == 'train' else 0])\n"
        f"    yield [{{'image': {made}, 'label': i % 4}} for i in range(8)]\n"
    )
    return f"hf:{folder / 'vit'}:loader={tmp_path / 'own.py'}:batches"


def test_images_of_any_usual_mode_are_what_they_show(folder, tmp_path) -> None:
    grey = "(r.integers(0, 255, (40, 40)).astype('uint16') + 0)"
    eight = load_task(images(folder, tmp_path, f"Image.fromarray({grey}.astype('uint8'))"), {}).example()
    sixteen = load_task(images(folder, tmp_path, f"Image.fromarray({grey} * 257)"), {}).example()
    assert np.array_equal(eight.inputs["pixel_values"], sixteen.inputs["pixel_values"])
    assert sixteen.inputs["pixel_values"].std() > 0.3  # and not white
    for mode in ("1", "P", "LA", "RGBA", "CMYK"):
        made = f"Image.fromarray(r.integers(0, 255, (40, 40, 3)).astype('uint8')).convert({mode!r})"
        assert load_task(images(folder, tmp_path, made), {}).example().inputs["pixel_values"].shape == (8, 3, 32, 32)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("r.random((40, 40, 3)).astype('float32')", "float32 (40, 40, 3)"),
        ("r.integers(0, 255, (3, 40, 40)).astype('uint8')", "uint8 (3, 40, 40)"),
        ("r.random((40, 40)).astype('float32')", "mode F"),
        ("r.integers(0, 9, (40, 40)).astype('int32')", "mode I"),
    ],
)
def test_images_whose_meaning_is_not_known_are_refused(folder, tmp_path, made, said) -> None:
    refused(images(folder, tmp_path, made), said, "own.py")


def test_audio_must_have_the_models_rate(folder, tmp_path) -> None:
    rows = {"audio": [{"array": [0.1] * 500, "sampling_rate": 8000}] * 20, "text": ["say red"] * 20}
    refused(
        f"hf:{folder / 'whisper'}:{saved(Dataset.from_dict(rows), tmp_path / '1')}", "8000 Hz", "640 Hz", "resample"
    )
    rows["audio"] = [{"array": [[0.1] * 500] * 2, "sampling_rate": 640}] * 20
    refused(
        f"hf:{folder / 'whisper'}:{saved(Dataset.from_dict(rows), tmp_path / '3')}", "shape (2, 500)", "one channel"
    )
    rows["audio"] = [{"bytes": b"RIFF no wave", "path": None}] * 20
    refused(f"hf:{folder / 'whisper'}:{saved(Dataset.from_dict(rows), tmp_path / '2')}", "cannot be read", "16-bit WAV")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [3]", "yielded int"),
        ("return []", "calibration split is empty"),
        ("raise KeyError('mine')", "KeyError"),
        ("return [[{'text': None, 'label': 0}]]", "text"),
    ],
)
def test_a_loader_that_does_not_work_is_named(folder, tmp_path, body, said) -> None:
    (tmp_path / "my.py").write_text(f"def batches(split, seed):\n    {body}\n")
    with pytest.raises(TaskError, match=said) as error:
        load_task(f"hf:{folder / 'bert'}:loader={tmp_path / 'my.py'}:batches", {})
    assert "my.py" in str(error.value)


def test_a_loader_must_exist(folder, tmp_path) -> None:
    refused(f"hf:{folder / 'bert'}:loader={tmp_path / 'no.py'}:batches", "no file")
    (tmp_path / "my.py").write_text("def batches(split, seed): ...\n")
    refused(f"hf:{folder / 'bert'}:loader={tmp_path / 'my.py'}:btches", "did you mean 'batches'")

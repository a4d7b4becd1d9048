"""Commands of the documentation, run as they are written on models of the zoo.

A block after `<!-- tested: NAME -->` is run line by line in a folder in which models and data of the zoo lie under the
names that the block uses; there are few images, so that a run takes a minute. Each test says what must come out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_runs import CPU
from doc_pages import DOCS, PAGES, blocks, body_of, commands_of

from onnxcop.cli import main as cli
from onnxcop.runtime.session import EngineOptions, Session

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(1500)]
TESTED = [
    (page.relative_to(DOCS).as_posix(), block.note.removeprefix("tested: "))
    for page in PAGES[:-1]
    for block in blocks(page)
    if block.note.startswith("tested: ")
]


class Place:
    """A folder to run commands in.

    Args:
        folder: The folder.
        zoo: The zoo.
        shown: Returns what was printed since the last call.
    """

    def __init__(self, folder: Path, zoo: Path, shown: Callable[[], str]) -> None:
        self.folder, self.zoo, self._shown = folder, zoo, shown

    def trained(self, name: str, source: str) -> None:
        """A trained model under another name."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(self.zoo / "trained" / source)

    def filled(self, name: str, skeleton: str) -> None:
        """A model whose weights are drawn."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        command = [sys.executable, self.zoo / "skeleton.py", "fill", self.zoo / "skeletons" / skeleton, path]
        subprocess.run(command, check=True, capture_output=True)

    def images(self, name: str = "images", count: int = 12) -> None:
        """A folder of pictures."""
        (self.folder / name).mkdir()
        for path in sorted((self.zoo / "data" / "imagenet_calib").iterdir())[:count]:
            (self.folder / name / path.name).symlink_to(path)

    def lines(self, name: str = "lines", count: int = 12) -> None:
        """A folder of pictures of lines of text."""
        from PIL import Image, ImageDraw

        (self.folder / name).mkdir()
        for number in range(count):
            text = " ".join(["prune", "this", "line", str(number)][: 2 + number % 3])
            image = Image.new("RGB", (16 + 14 * len(text), 32), "white")
            ImageDraw.Draw(image).text((8, 8), text, "black", font_size=18)
            image.save(self.folder / name / f"{number}.png")

    def run(self, arguments: list[str], code: int = 0) -> str:
        """What a command prints."""
        found = cli.run(arguments)
        shown = self._shown()
        assert found == code, f"onnxcop {' '.join(arguments)}: {shown}"
        return " ".join(shown.split())


@pytest.fixture
def place(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Place]:
    def shown() -> str:
        out, err = capsys.readouterr()
        return err + out

    monkeypatch.chdir(tmp_path)
    yield Place(tmp_path, zoo, shown)


def test_every_block_that_says_so_is_tested() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    for page, name in TESTED:
        assert re.search(rf'(commands|body)_of\("{page}", "{name}"\)', source), f"{page}: {name}"


HUGGING_FACE = {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3, "do_normalize": True,
                "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # fmt: skip
TIMM = {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 224, 224], "interpolation": "bicubic",
        "crop_pct": 0.95, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}  # fmt: skip


@pytest.mark.slow
def test_preprocessing_is_what_the_model_declares(place: Place) -> None:
    place.trained("yolov8n.onnx", "yolov8n_320.onnx")
    place.trained("ppocr_v4_rec.onnx", "ppocr_v4_rec.onnx")
    place.filled("resnet/model.onnx", "hf_resnet.legacy.onnx")
    place.filled("timm/model.onnx", "resnet18.legacy.onnx")
    (place.folder / "resnet" / "preprocessor_config.json").write_text(json.dumps(HUGGING_FACE))
    (place.folder / "timm" / "config.json").write_text(json.dumps(TIMM))
    place.images()
    place.lines()
    expected = (
        "as the model's metadata (ultralytics, detect, 18 classes) says: 320×320, rgb, nchw, letterbox",
        "as the model's metadata (a list of characters: PaddleOCR text recognition) says: 48×320, bgr, nchw, pad",
        "preprocessor_config.json",
        "config.json",
    )
    for command, words in zip(commands_of("howto/data.md", "declared"), expected, strict=True):
        assert words in place.run(command)
        assert Path(command[2].rstrip("/")).exists()


@pytest.mark.slow
def test_presets_by_name(place: Place) -> None:
    place.trained("mobilenet_v2.onnx", "imagenet_mobilenet_v2.onnx")
    place.filled("efficientnet_lite0.onnx", "efficientnet_lite0.legacy.onnx")
    place.filled("keras.onnx", "keras_MobileNetV2.onnx")
    place.filled("resnet18.onnx", "resnet18.legacy.onnx")
    place.trained("tensorflow.onnx", "thin_resnet50_nhwc.onnx")
    place.trained("detector.onnx", "yolov8n_320.onnx")
    place.trained("text_detector.onnx", "ppocr_v4_det.onnx")
    place.trained("faces.onnx", "ultraface_rfb_320.onnx")
    place.images()
    expected = (
        "224×224, rgb, nchw, centre crop 0.875, x/255, minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225)",
        "224×224, rgb, nchw, centre crop 0.875, bicubic, minus (127), over (128)",
        "224×224, rgb, nhwc, stretch, x*0.00784314, minus (1), over (1)",
        "224×224, rgb, nchw, centre crop 0.875, bicubic, x/255, minus (0.485, 0.456, 0.406)",
        "224×224, rgb, nhwc, stretch, minus (127.5), over (127.5)",
        "320×320, rgb, nchw, letterbox with 114, x/255",
        "640×640, bgr, nchw,",
        "240×320, rgb, nchw, stretch, area, minus (127), over (128)",
    )
    for command, words in zip(commands_of("howto/data.md", "presets"), expected, strict=True):
        shown = place.run(command)
        assert words in shown, shown
        assert Path("small.onnx").exists()


def test_a_guess_that_fits_badly_is_doubted(place: Place) -> None:
    place.trained("digits.onnx", "digit_cnn.onnx")
    with np.load(place.zoo / "data" / "mnist_calib.npz") as data:
        np.savez(place.folder / "digits.npz", images=data["images"][:64])
    (guessed, named) = commands_of("howto/data.md", "doubted")
    assert "the preprocessing 'unit' is a guess, and with 'none' the model distinguishes" in place.run(guessed)
    assert "is a guess" not in place.run(named)


@pytest.mark.slow
def test_text_recognition_at_half_its_size(place: Place) -> None:
    place.trained("ppocr_v4_rec.onnx", "ppocr_v4_rec.onnx")
    place.lines(count=24)
    (command,) = commands_of("howto/paddle.md", "text recognition")
    assert "48×320, bgr, nchw, pad" in place.run(command)
    assert Path("small.onnx").stat().st_size <= 5_400_000


def test_a_gate_fails_and_holds(place: Place) -> None:
    place.trained("model.onnx", "cifar_resnet20.onnx")
    with np.load(place.zoo / "data" / "cifar10_calib.npz") as data:
        np.savez(place.folder / "images.npz", images=data["images"][:64])
    place.run("model.onnx -o small.onnx --macs 0.5 --criterion l2 --recover none --latency-seconds 0".split())
    (command,) = commands_of("howto/automate.md", "gate")
    shown = place.run(command, 3)
    assert "agreement" in shown and "size" in shown
    loose = [
        word.replace("agreement>=.97, time<=.8, size<=60%", "agreement>=0, time<=9, size<=90%") for word in command
    ]
    assert loose != command
    place.run(loose)


@pytest.mark.slow
def test_a_recipe_and_back(place: Place) -> None:
    place.trained("model.onnx", "cifar_resnet20.onnx")
    (place.folder / "images").mkdir()
    from PIL import Image

    with np.load(place.zoo / "data" / "cifar10_calib.npz") as data:
        for number, pixels in enumerate(data["images"][:64]):
            Image.fromarray(pixels).save(place.folder / "images" / f"{number}.png")
    Path("recipe.yaml").write_text(body_of("howto/automate.md", "recipe file"))
    first, second = commands_of("howto/automate.md", "recipe")
    assert "64 of 64 samples" in place.run(first)
    small, whole = onnx.load("small.onnx"), onnx.load("model.onnx")

    def widths(model: onnx.ModelProto, part: str) -> list[int]:
        stored = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
        return [stored[node.input[1]] for node in model.graph.node if node.op_type == "Conv" and part in node.name]

    assert sum(widths(small, "")) < sum(widths(whole, ""))
    assert widths(small, "/conv1/")[0] == widths(whole, "/conv1/")[0]  # kept
    assert all(2 * kept >= width for kept, width in zip(widths(small, "layer3"), widths(whole, "layer3"), strict=True))
    Path("recipe.yaml").unlink()
    place.run(second)
    assert "layers" in Path("recipe.yaml").read_text()


@pytest.mark.slow
def test_some_of_the_classes(place: Place) -> None:
    """The zoo's detector has other names for its classes, so it is given those of the page."""
    model = onnx.load(place.zoo / "trained" / "yolov8n_320.onnx")
    for entry in model.metadata_props:
        if entry.key == "names":
            known = dict(enumerate(["person", "bicycle", *(f"thing {number}" for number in range(2, 18))]))
            entry.value = repr(known)
    onnx.save(model, place.folder / "yolov8n.onnx")
    place.images()
    (command,) = commands_of("howto/classes.md", "detector")
    place.run(command)
    small = onnx.load("people.onnx")
    assert small.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 4 + 2
    assert next(entry.value for entry in small.metadata_props if entry.key == "names") == repr(
        {0: "person", 1: "bicycle"}
    )


@pytest.fixture
def sentences(place: Place) -> Place:
    """The zoo's sentence encoder with a tokenizer of as many words, and texts of these words."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    model = onnx.load(place.zoo / "trained" / "nlp_minilm.onnx")
    count = max(tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2 and tensor.dims[1] == 384)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(count - len(special)))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    home = place.folder / "minilm"
    home.mkdir()
    tokenizer.save(str(home / "tokenizer.json"))
    (home / "model.onnx").symlink_to(place.zoo / "trained" / "nlp_minilm.onnx")
    (home / "config.json").write_text(json.dumps({"vocab_size": count, "hidden_size": 384, "intermediate_size": 1536}))
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 500, 10)) for _ in range(24)]
    (place.folder / "texts.txt").write_text("\n".join(texts))
    return place


@pytest.mark.slow
def test_a_folder_of_hugging_face(sentences: Place) -> None:
    (command,) = commands_of("howto/huggingface.md", "encoder")
    sentences.run(command)
    small, whole = (Path(folder, "model.onnx").stat().st_size for folder in ("minilm-small", "minilm"))
    assert small < whole
    assert {path.name for path in Path("minilm-small").iterdir()} == {"model.onnx", "config.json", "tokenizer.json"}
    assert json.loads(Path("minilm-small/config.json").read_text()) != json.loads(
        Path("minilm/config.json").read_text()
    )


@pytest.mark.slow
def test_a_trimmed_vocabulary(sentences: Place) -> None:
    (command,) = commands_of("howto/huggingface.md", "vocabulary")
    sentences.run(command)
    config = json.loads(Path("minilm-trimmed/config.json").read_text())
    assert 100 < config["vocab_size"] < 600
    whole, small = (Path(folder, "model.onnx").stat().st_size for folder in ("minilm", "minilm-trimmed"))
    assert small < whole - 4 * 384 * 5000


@pytest.mark.slow
def test_fused_and_quantized_encoders(place: Place) -> None:
    """The files are made by ONNX Runtime's own tools, as the page shows; what they are made of is asserted."""
    pytest.importorskip("onnxruntime.transformers.optimizer", reason="ONNX Runtime has no optimizer of transformers")
    place.trained("encoder.onnx", "nlp_minilm.onnx")
    (place.folder / "sentences.npz").symlink_to(place.zoo / "data" / "minilm_calib.npz")
    exec(compile(body_of("transformers.md", "fused and quantized files"), "transformers.md", "exec"), {})
    contents = (
        ("Attention", "SkipLayerNormalization", "BiasGelu", "MatMulNBits"),
        ("QAttention", "DynamicQuantizeLinear", "MatMulInteger"),
        ("QAttention", "DynamicQuantizeMatMul"),
    )
    for command, operators in zip(commands_of("transformers.md", "fused and quantized"), contents, strict=True):
        assert {*operators} <= {node.op_type for node in onnx.load(command[0]).graph.node}
        shown = place.run([*command, *CPU, "--json", "-q"])
        report = json.loads(shown[shown.index("{") :])
        assert report["after"]["macs"] <= 0.9 * report["before"]["macs"]
        assert report["after"]["bytes"] < 0.96 * report["before"]["bytes"]
        assert report["figures"]["outputs"][0]["agreement"]["value"] > 0.9  # the mean cosine
        exact = report["verification"]["exact_units"] > 0 and report["verification"]["max_difference"] < 1e-4
        assert exact or "QAttention" in operators  # ranges at run time change with what is removed
        with np.load("sentences.npz") as data, Session(command[2], EngineOptions("cpu", 1)) as session:
            (vectors,) = session.run({name: data[name][:4] for name in data.files}).values()
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-3)


@pytest.mark.slow
def test_shares_of_a_size_and_of_time(place: Place) -> None:
    place.trained("model.onnx", "digit_cnn.onnx")
    with np.load(place.zoo / "data" / "mnist_calib.npz") as data:
        np.savez(place.folder / "digits.npz", images=data["images"][:128])
    (command,) = commands_of("howto/deploy.md", "size")
    place.run(command)
    assert Path("small.onnx").stat().st_size <= 0.5 * Path("model.onnx").stat().st_size


@pytest.mark.slow
def test_openvino(place: Place) -> None:
    """In an environment of its own, installed as the page says; its wheel runs on a CPU."""
    python = os.environ.get("ONNXCOP_OPENVINO_PYTHON")
    if not python:
        pytest.skip("name the Python of an environment with onnxruntime-openvino in ONNXCOP_OPENVINO_PYTHON")
    place.trained("model.onnx", "cifar_resnet20.onnx")
    with np.load(place.zoo / "data" / "cifar10_calib.npz") as data:
        np.savez(place.folder / "images.npz", images=data["images"][:64])
    root = Path(__file__).resolve().parents[1]
    for command in commands_of("howto/providers.md", "openvino"):
        done = subprocess.run(
            [python, "-m", "onnxcop", *command], capture_output=True, text=True, check=False, cwd=place.folder,
            env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if command[0] != "compare":
            assert "OpenVINOExecutionProvider" in done.stdout and "verified: " in done.stdout
        else:
            assert "latency" in done.stdout and "agreement" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_resnet20", "imagenet_mobilenet_v2", "yolov8n_320"])
def test_int8_after_pruning(name: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed of a row of the table; the command is the page's.

    Results are kept in the folder that ONNXCOP_INT8_WORK names, of which `tools/bench_int8.py` makes the table.
    """
    monkeypatch.setenv("ONNXCOP_ZOO", str(zoo))
    import bench_int8

    network = next(entry for entry in bench_int8.NETWORKS if entry.name == name)
    shown = [command for command in commands_of("howto/toolchains.md", "int8") if command[0] == f"{name}.onnx"]
    assert [network.command(3)[1:]] == shown
    work = Path(os.environ.get("ONNXCOP_INT8_WORK") or tmp_path)
    assert bench_int8.run(network, 3, work)
    found = json.loads((work / f"{name}.3.json").read_text())
    _, pruned, int8 = found["shares"]
    assert pruned - int8 <= 1.0 + 2 * found["error"]
    assert found["bytes"] < 0.4

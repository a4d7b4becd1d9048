"""How well a detector reduced to one class, and pruned, finds that class, beside the whole detector pruned less.

    python tools/bench_classes.py DETECTOR --class person --macs 0.5 --whole-macs 0.8 \
        --data IMAGES/ --preprocess ultralytics --images OTHER_IMAGES/

Both are calibrated on the same images. On the others, boxes of this class are compared with the original's: the share
that can be paired one to one with an overlap of one half or more, 2 · pairs / (boxes of both), with its standard error
over images. Boxes count from a confidence of 0.25 on, after non-maximum suppression, as in the package's own agreement.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

import onnxcop
from onnxcop._base.types import Array
from onnxcop.data.open import open_data
from onnxcop.data.options import DataOptions
from onnxcop.outputs.detections import Boxes, form_of, matched
from onnxcop.outputs.intervals import standard_error

_BOX = 4


def answers(model: onnx.ModelProto, images: Sequence[Array]) -> list[Array]:
    """The first output for every image, float32 [1, …]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [session.run(None, {name: image})[0] for image in images]


def boxes_of(outputs: Sequence[Array], metadata: dict[str, str], number: int) -> list[Boxes]:
    """Boxes that a user sees of one class, image by image."""
    form, shown = form_of([list(outputs)], metadata), []
    for output in outputs:
        rows = form.rows(output[0])
        boxes = form.shown(rows[:, :_BOX], rows[:, _BOX:])
        chosen = boxes.classes == number
        shown.append(Boxes(boxes.corners[chosen], np.zeros(int(chosen.sum()), np.int64)))
    return shown


def paired(one: Sequence[Boxes], other: Sequence[Boxes]) -> tuple[float, float]:
    """The share of boxes that both have, and its standard error by leaving out one image after another."""
    hits = np.array([2.0 * matched(a, b) for a, b in zip(one, other, strict=True)])
    boxes = np.array([float(len(a.classes) + len(b.classes)) for a, b in zip(one, other, strict=True)])
    share = hits.sum() / boxes.sum()
    without = (hits.sum() - hits) / np.maximum(boxes.sum() - boxes, 1.0)
    return float(share), standard_error(without)


def main() -> None:
    """Parse the command line, prune twice, and print both shares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("detector", type=Path)
    parser.add_argument("--class", dest="wanted", type=int, required=True, help="number of the class")
    parser.add_argument("--macs", type=float, default=0.5, help="left of the reduced detector (default 0.5)")
    parser.add_argument("--whole-macs", type=float, default=0.8, help="left of the whole detector (default 0.8)")
    parser.add_argument("--data", required=True, help="images to calibrate on")
    parser.add_argument("--preprocess", required=True)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--images", required=True, help="other images, to compare on")
    parser.add_argument("--most", type=int, default=1000, help="images to compare on")
    parser.add_argument("--input-shape", default="", help="of the input, e.g. 1,3,320,320")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("classes_out"))
    args = parser.parse_args()
    original = onnx.load(args.detector)
    name = original.graph.input[0].name
    shapes = {name: tuple(map(int, args.input_shape.split(",")))} if args.input_shape else None
    given = {
        "data": args.data, "preprocess": args.preprocess, "samples": args.samples, "seed": args.seed,
        "input_shapes": shapes, "options": onnxcop.EngineOptions(provider="cpu", threads=1), "latency_seconds": 0,
    }  # fmt: skip
    analysis = onnxcop.analyze(original, input_shapes=shapes)
    others = open_data(analysis, DataOptions(data=args.images, preprocess=args.preprocess, samples=args.most))
    if others is None:
        raise SystemExit("no images to compare on")
    images = [np.asarray(feed[name]) for feed in others.in_batches_of(1).batches()]
    metadata = {entry.key: entry.value for entry in original.metadata_props}
    truth = boxes_of(answers(original, images), metadata, args.wanted)
    print(f"{sum(len(boxes.classes) for boxes in truth)} boxes of class {args.wanted} on {len(images)} images")
    args.out.mkdir(parents=True, exist_ok=True)
    for what, options, number in (
        ("reduced", {"macs": args.macs, "classes": [args.wanted]}, 0),
        ("whole", {"macs": args.whole_macs}, args.wanted),
    ):
        result = onnxcop.prune(original, **options, **given)
        onnx.save(result.model, args.out / f"{what}.onnx")
        own = {entry.key: entry.value for entry in result.model.metadata_props}
        share, error = paired(truth, boxes_of(answers(result.model, images), own, number))
        print(f"{what}: {100 * share:.1f} ± {100 * error:.1f} % of the boxes in common", flush=True)


if __name__ == "__main__":
    main()

"""The contestants: static engines on a plain twin of the network, and las_mm's own forms.

What takes part on one kind of device is an :class:`EngineSet`: :data:`CPU` here, ``CUDA`` in
``cuda_engines``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from las_mm.benchmark import report
from las_mm.benchmark.contest import (
    Contestant,
    Timer,
    check_contestant,
    check_finite,
    peak_memory,
    wall_time,
)
from las_mm.benchmark.static_engines import (
    Skip,
    build_compile,
    build_eager_nchw,
    build_eager_nhwc,
    build_onnxruntime,
    build_onnxruntime_int8,
    build_openvino,
    build_openvino_int8,
    torch_engine,
)
from las_mm.benchmark.subject import Subject
from las_mm.errors import UserError
from las_mm.models.activation import NetworkActivation
from las_mm.models.finding import collect_activations
from las_mm.models.flops import flops_report
from las_mm.models.sparse import masked_dense

# Largest relative error of an output: static engines against eager, las_mm against masked-dense.
# A hundred int8 layers with random weights are off by a quarter of the largest value.
STATIC_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "int8": 0.5}
DYNAMIC_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


def build_static(subject: Subject) -> Contestant:
    """las_mm's runtime on the static form of the network."""
    return torch_engine("las_mm-static", "ours", subject.static, subject.cast_x)


def build_masked_dense(subject: Subject) -> Contestant:
    """The dynamic network on dense convolutions."""
    x = subject.cast_x

    @torch.inference_mode()
    def run() -> tuple[Tensor, ...]:
        with masked_dense():
            return subject.dynamic(x)

    return Contestant("masked-dense", "reference", run)


def build_dynamic(subject: Subject) -> Contestant:
    """The dynamic network as las_mm runs it."""
    return torch_engine("las_mm", "ours", subject.dynamic, subject.cast_x)


BUILDERS: dict[str, Callable[[Subject], Contestant]] = {
    "eager-nchw": build_eager_nchw,
    "eager-nhwc": build_eager_nhwc,
    "compile": build_compile,
    "onnxruntime": build_onnxruntime,
    "openvino": build_openvino,
    "onnxruntime-int8": build_onnxruntime_int8,
    "openvino-int8": build_openvino_int8,
    "las_mm-static": build_static,
    "masked-dense": build_masked_dense,
    "las_mm": build_dynamic,
}
INT8 = "-int8"  # ends the names of quantised engines
STATIC_ENGINES = (
    "eager-nchw",
    "eager-nhwc",
    "compile",
    "onnxruntime",
    "openvino",
    "onnxruntime-int8",
    "openvino-int8",
)


@dataclass(frozen=True)
class EngineSet:
    """Who takes part on one kind of device, and how it is measured there.

    Attributes:
        device: ``'cpu'`` or ``'cuda'``.
        builders: All engines by name, in the order of the table.
        static: The rivals among them.
        dynamic: las_mm's dynamic forms; the first always runs, the others where they can.
        aliases: Names for several engines.
        dtypes: What ``--dtype`` may be.
        only_fp32: Engines that are left out in other dtypes.
        timer: How long one call takes.
        peak_memory: Largest memory in MiB while a contestant runs.
        check: Raises a :class:`UserError` if this machine cannot run las_mm in a dtype.
        describe: What the result says about the device.
        static_tolerance: Largest relative error of an output of a static engine against eager in
            float32, by dtype or TF32.
        dynamic_tolerance: The same of las_mm against masked-dense.
    """

    device: str
    builders: Mapping[str, Callable[[Subject], Contestant]]
    static: tuple[str, ...]
    dynamic: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]]
    dtypes: tuple[str, ...]
    static_tolerance: Mapping[str, float]
    dynamic_tolerance: Mapping[str, float]
    timer: Timer
    peak_memory: Callable[[Contestant], float]
    describe: Callable[[], dict[str, object]]
    check: Callable[[str], None] = lambda dtype: None
    only_fp32: frozenset[str] = frozenset()

    def names(self, dtype: str) -> list[str]:
        """Everybody who takes part in ``dtype`` if nobody is asked for by name."""
        return [
            name
            for name in self.builders
            if (dtype == "fp32" or name not in self.only_fp32)
            and (dtype == "int8" or not name.endswith(INT8))
        ]


CPU = EngineSet(
    device="cpu",
    builders=BUILDERS,
    static=STATIC_ENGINES,
    dynamic=("las_mm",),
    aliases={"eager": ("eager-nchw", "eager-nhwc")},
    dtypes=("fp32", "bf16", "int8"),
    static_tolerance=STATIC_TOLERANCE,
    dynamic_tolerance=DYNAMIC_TOLERANCE,
    timer=wall_time,
    peak_memory=peak_memory,
    describe=lambda: dict(type="cpu", name=report.cpu_name()),
)
TF32 = "-tf32"  # ends the names of engines that may round float32 products to TF32


def precision_of(engine: str, dtype: str) -> str:
    """How an engine multiplies in a benchmark of ``dtype``: a dtype, or ``'tf32'``.

    A benchmark of int8 is one of quantised rivals; everybody else runs in float32.
    """
    for ending in (TF32, INT8):
        if engine.endswith(ending):
            return ending[1:]
    return "fp32" if dtype == "int8" else dtype


def _admit(
    name: str, explicit: Container[str], skipped: list[dict], build: Callable[[], Contestant]
) -> list[Contestant]:
    """The contestant in a list, or none if it cannot run, which ``skipped`` then says.

    Raises:
        UserError: It computes something else, or was asked for by name and cannot run.
    """
    try:
        return [build()]
    except UserError:
        raise
    except Exception as error:  # a compiler or engine may raise anything
        reason = str(error).strip() or "no reason given"
        if not isinstance(error, Skip):
            reason = f"{type(error).__name__}: {reason.splitlines()[0]}"
        if name in explicit:
            raise UserError(f"engine {name} cannot run: {reason}") from error
        skipped.append(dict(engine=name, reason=reason))
        return []


def enter_static(
    subject: Subject,
    names: Sequence[str],
    explicit: Container[str],
    say: Callable[[str], None],
    engines: EngineSet = CPU,
) -> tuple[list[Contestant], list[dict[str, str]]]:
    """Build and check all contestants without masks; also say who cannot run, and why.

    Args:
        subject: The network.
        names: Engines of the set.
        explicit: Engines that must be able to run.
        say: Called with what is being done.
        engines: Those of the device.

    Returns:
        The contestants, and ``{'engine': ..., 'reason': ...}`` for those who cannot run.

    Raises:
        UserError: One computes something else, or one asked for by name cannot run.
    """
    contestants: list[Contestant] = []
    skipped: list[dict[str, str]] = []
    for name in names:
        if name == "masked-dense" or name in engines.dynamic:
            continue
        say(f"building {name}")

        def build(name: str = name) -> Contestant:
            contestant = engines.builders[name](subject)
            contestant.precision = precision_of(name, subject.dtype)
            tolerance = engines.static_tolerance[contestant.precision]
            check_contestant(contestant, subject.expected, tolerance, "eager in fp32")
            return contestant

        contestants += _admit(name, explicit, skipped, build)
    if not report.rivals(contestants, subject.dtype):
        what = "int8 engine" if subject.dtype == "int8" else "engine"
        reasons = "; ".join(f"{s['engine']}: {s['reason']}" for s in skipped)
        raise UserError(f"no static {what} can run: {reasons or 'none was asked for'}")
    return contestants, skipped


@dataclass
class DynamicPoint:
    """las_mm's dynamic forms with the masks of one rate.

    Attributes:
        contestants: One per form, the plain one first.
        activation: What the blocks did.
        flops_ratio: Dynamic over static multiply-accumulates.
    """

    contestants: list[Contestant]
    activation: NetworkActivation
    flops_ratio: float

    @property
    def mean_rate(self) -> float:
        """Mean activation rate of the dynamic blocks."""
        return self.activation.mean_rate.item()

    @property
    def mean_rate_channel(self) -> float:
        """Mean channel rate of the blocks that may leave out channels; 1 if there are none."""
        return self.activation.mean_rate_channel.item()

    @property
    def fastest(self) -> Contestant:
        """The form with the smallest median."""
        return min(self.contestants, key=lambda contestant: contestant.median)


@dataclass
class Dynamic:
    """Everything with masks.

    Attributes:
        points: One per rate.
        reference: The masked-dense network at the first rate.
        skipped: As :func:`enter_static` returns it.
    """

    points: list[DynamicPoint] = field(default_factory=list)
    reference: Contestant | None = None
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def contestants(self) -> list[Contestant]:
        """las_mm's forms at all rates."""
        return [contestant for point in self.points for contestant in point.contestants]


def enter_dynamic(
    subject: Subject,
    setters: Sequence[Callable[[], None]],
    say: Callable[[str], None],
    names: Sequence[str] = ("las_mm",),
    explicit: Container[str] = (),
    engines: EngineSet = CPU,
) -> Dynamic:
    """Build and check las_mm for each rate.

    Args:
        subject: The network.
        setters: Per rate a function that sets the masks.
        say: Called with what is being done.
        names: Engines of the set; those without masks are passed over.
        explicit: Engines that must be able to run.
        engines: Those of the device.

    Returns:
        The contestants. A form that cannot run at the first rate is not tried at the others.

    Raises:
        UserError: It computes something else than dense convolutions with the same masks.
    """
    dynamic = Dynamic(reference=engines.builders["masked-dense"](subject))
    assert dynamic.reference is not None
    dynamic.reference.precision = precision_of("masked-dense", subject.dtype)
    forms = [name for name in engines.dynamic if name in names]
    for setter in setters:
        say("comparing las_mm with masked-dense")
        dynamic.reference.prepare = setter
        expected = dynamic.reference.outputs()
        check_finite(expected, "the dynamic network")
        activation = collect_activations(subject.dynamic)

        def build(name: str, setter=setter, expected=expected) -> Contestant:
            contestant = engines.builders[name](subject)  # may run it, with the masks just set
            contestant.prepare = setter
            contestant.precision = precision_of(name, subject.dtype)
            tolerance = engines.dynamic_tolerance[contestant.precision]
            check_contestant(contestant, expected, tolerance, "masked-dense")
            return contestant

        plain, *others = forms
        point = DynamicPoint([build(plain)], activation, flops_report(activation).ratio.item())
        for name in others:
            say(f"building {name}")
            made = _admit(name, explicit, dynamic.skipped, lambda name=name: build(name))
            point.contestants += made
            if not made:
                forms.remove(name)
        dynamic.points.append(point)
    dynamic.reference.prepare = setters[0]
    return dynamic

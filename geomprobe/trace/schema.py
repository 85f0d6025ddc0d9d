"""The one place that names files, groups and columns, and says what each column means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import quote, unquote

from geomprobe.errors import GeomprobeError
from geomprobe.trace import geometry

TRACE_SCHEMA = "geomprobe-trace"
RECORD_SCHEMA = "geomprobe-record"
VERSIONS = {RECORD_SCHEMA: 2, TRACE_SCHEMA: 1}
"""The version of each format; a record of version 1 had no digests of gradients."""

RECORD_FILE = "record.h5"
TRACE_FILE = "trace.h5"
STREAM_DIR = "stream"
REFERENCE_PREFIX = "reference-"
RANKS = "ranks"
REFERENCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SEALING_PREFIX = "sealing-"

VALUES = "values"
"""The one table of a trace part; its columns are the raw paths of the sealed file."""
STEPS = "steps"
"""The float64 table of a record part."""
Kind = Literal["record", "trace"]
"""Which pass."""
SCHEMAS: dict[Kind, str] = {"record": RECORD_SCHEMA, "trace": TRACE_SCHEMA}
FILES = {RECORD_SCHEMA: RECORD_FILE, TRACE_SCHEMA: TRACE_FILE}
TABLES: dict[Kind, str] = {"record": STEPS, "trace": VALUES}
"""The float64 table of a part."""
FINGERPRINTS = "fingerprints"
"""Prefix of the int64 tables of a record part, one a component."""
SKETCH = "sketch"
"""The float64 table of a record part, and group of the sealed record, that holds the sketches, if there are any."""
FINAL = "final"
"""The reference that every trace has: the final iterate."""


@dataclass(frozen=True)
class Column:
    """One column: its name within its group, the four attributes that every sealed dataset carries, and its values.

    A derived column is computed from raw ones: ``compute`` takes the arrays of ``inputs``, which are inner products,
    or the step's ``loss`` and ``lr``, with spaces between; `input_path` says where they are. A raw column has neither.

    >>> describe("steps/lolr").formula, describe("steps/lolr").inputs
    ('G.d / ||G||^2', 'g.d g.g')
    """

    name: str
    long_name: str
    units: str
    formula: str
    source: str
    inputs: str = ""
    compute: Callable[..., Any] | None = None

    @property
    def attributes(self) -> dict[str, str]:
        """What its dataset says of itself."""
        return {name: getattr(self, name) for name in ("long_name", "units", "formula", "source")}


def _same(values: Any) -> Any:
    """A column that is a raw one under another name."""
    return values


class UnknownColumn(GeomprobeError, KeyError):
    """A column name that the schema, or this trace, does not have; the message lists near matches."""

    def __str__(self) -> str:
        return str(self.args[0])


def _columns(text: str) -> tuple[Column, ...]:
    """Columns written as ``name | long name | units | formula | source``, one a line.

    A derived one goes on with a function of `geometry` and its inputs, or with the raw column that it repeats.
    """
    columns = []
    for line in text.strip().splitlines():
        name, long_name, units, formula, source, *made = [field.strip() for field in line.split(" | ")]
        function, _, inputs = "".join(made).rpartition("(")
        compute = getattr(geometry, function) if function else _same if inputs else None
        inputs = inputs.rstrip(")").replace(",", "")
        columns.append(Column(name, long_name, units, formula, source, inputs, compute))
    return tuple(columns)


# G, w, w* and d = w - w* are NWT's; one row is one optimizer step, taken before the weights move.
STEP_COLUMNS = _columns("""
step              | optimizer step, counted from 0 | 1 | t | counted
epoch             | epoch the step belongs to | 1 | epoch | recorded
loss              | training loss of the step | loss | E | recorded
lr                | learning rate of the first parameter group | lr | lr | optimizer | lr
grad_norm         | norm of the gradient | loss/weight | ||G|| | NWT section 3 | grad_norm(g.g)
distance          | distance to the reference | weight | ||w - w*|| | NWT figure 12 | distance(d.d)
grad_dot_offset   | gradient along the offset | loss | G.(w - w*) | NWT section 3 | g.d
rsi               | restricted secant inequality | 1/lr | G.d / ||d||^2 | NWT section 3 | rsi(g.d, d.d)
eb                | error bound | 1/lr | ||G|| / ||d|| | NWT section 3 | eb(g.g, d.d)
cosine            | cosine of gradient and offset | 1 | G.d / (||G|| ||d||) | NWT section 3 | cosine(g.d, g.g, d.d)
lolr              | locally optimal learning rate | lr | G.d / ||G||^2 | NWT eq. 5 | lolr(g.d, g.g)
clr               | corridor learning rate | lr | E / ||G||^2 | CG eq. 3 | clr(loss, g.g)
hg_norm           | norm of the Hessian-gradient product | loss/weight/lr | ||HG|| | CG lemma 2.8 | grad_norm(Hg.Hg)
g_hg              | curvature along the gradient | loss^2/weight^2/lr | G.HG | CG lemma 2.8 | g.Hg
corridor_residual | turn rate of the gradient along the flow | 1/lr | ||HG|| / ||G|| | CG lemma 2.8 | \
corridor_residual(Hg.Hg, g.g)
relative_residual | the gradient's turn over one step | 1 | lr ||HG|| / ||G|| | CG theorem 2.11 | \
relative_residual(lr, Hg.Hg, g.g)
flow_drift        | gap between step and gradient flow | weight | lr^2 ||HG|| / 2 | CG theorem 3.1 | \
flow_drift(lr, Hg.Hg)
""")

# `attempt` only where a GradScaler was at work; `same` only in an uncertified replay: 0 from the first difference on.
# `optimizer` only where several step the model.
ATTEMPT, SAME, ABSENT, OPTIMIZER = _columns("""
attempt | attempt at a step, of which some overflow and are skipped | 1 | t + skipped | counted
same    | 1 while the replay equalled the recording | 1 | same | replay
absent  | reasons for which numbers are left out, added up | 1 | see geomprobe.trace.absence | replay
optimizer | number of the optimizer that moves, of several | 1 | i | counted
""")

# Only where they were asked for; they are measured as they are, not derived from inner products.
ASKED_FOR = _columns("""
sharpness           | top eigenvalue of the Hessian | 1/lr | max eig(H) | CG section 1 (edge of stability)
secant_residual     | turn rate of the gradient over a whole step | 1/lr | ||g(w) - g(w - lr G)|| / (lr ||G||) | \
CG theorem 3.1, without its limit
linear_decrease_gap | loss after the step above its linear decrease | loss | E(w - lr G) - (E(w) - lr g(w).G) | \
CG proposition 2.10
""")
OPTIONAL_STEP_COLUMNS = (ATTEMPT, SAME, ABSENT, OPTIMIZER, *ASKED_FOR)

INNER_PRODUCTS = _columns("""
g.g   | gradient with itself | loss^2/weight^2 | G.G | measured
w.g   | weights with gradient | loss | w.G | measured
w.w   | weights with themselves | weight^2 | w.w | measured
g.d   | gradient with offset | loss | G.(w - w*) | measured
w.d   | weights with offset | weight^2 | w.(w - w*) | measured
d.d   | offset with itself | weight^2 | (w - w*).(w - w*) | measured
g.Hg  | gradient with Hessian-gradient product | loss^2/weight^2/lr | G.HG | measured
Hg.Hg | Hessian-gradient product with itself | loss^2/weight^2/lr^2 | HG.HG | measured
""")

GROUP_COLUMNS = _columns("""
lr           | learning rate of the parameter group | lr | lr | optimizer
weight_decay | weight decay of the parameter group | 1/lr | lambda | optimizer
momentum     | momentum of the parameter group | 1 | beta | optimizer
""")


MOVING_LR = "groups/moving/lr"
"""Path of the rate of the first group of the optimizer that moves, where there are several."""
_OF_MOVING = _columns("""
lr | learning rate of the first parameter group of the optimizer that moves | lr | lr | optimizer
""")


def _chosen(columns: Iterable[Column], *names: str) -> tuple[Column, ...]:
    return tuple(column for column in columns if column.name in names)


_OF_AN_OFFSET = ("grad_dot_offset", "rsi", "eb", "cosine", "lolr")
RECORD_COLUMNS = STEP_COLUMNS[:4]
REFERENCE_COLUMNS = _chosen(STEP_COLUMNS, "distance", *_OF_AN_OFFSET)
REFERENCE_PRODUCTS = _chosen(INNER_PRODUCTS, "g.d", "w.d", "d.d")
ORACLE_PRODUCTS = _chosen(INNER_PRODUCTS, "g.g", "w.g", "g.d", "d.d")
"""Of a gradient that is measured beside the step's own, G in their formulas."""


def _oracle_columns(of: str, source: str, *names: str) -> tuple[Column, ...]:
    columns = _chosen(STEP_COLUMNS, *names, "grad_norm", *_OF_AN_OFFSET)
    return tuple(replace(each, long_name=f"{each.long_name}, of {of}", source=source) for each in columns)


UNCLIPPED = "unclipped"
ORACLES = {
    "held_out": _oracle_columns(
        "a minibatch that the update does not use",
        "NWT section 3, without the correlation of section 6",
        "loss",
    ),
    UNCLIPPED: _oracle_columns("the gradient before it was clipped", "NWT section 3"),
    "full_gradient": _oracle_columns(
        "all samples, at the end of an epoch", "NWT section 3, of the training loss", "loss"
    ),
}
"""Groups of gradients that are measured beside the step's own, where they were asked for."""

FINAL_LINKS = (
    *(f"references/{FINAL}/{column.name}" for column in REFERENCE_COLUMNS),
    *(f"references/{FINAL}/inner_products/{column.name}" for column in REFERENCE_PRODUCTS),
)
"""Second names of the final iterate's columns; `canonical` gives the first."""

COMPONENTS = ("rng", "batch", "weights", "hyperparameters", "optimizer", "loss", "buffers", "gradient")
"""What a step's fingerprints cover, in the order of blame: an earlier one that differs explains the later."""


def escape(name: str) -> str:
    """A parameter's or reference's name as one HDF5 path component; `unescape` undoes it.

    >>> escape("layer1.0.conv.weight"), escape("a/b"), unescape(escape("50%/x"))
    ('layer1.0.conv.weight', 'a%2Fb', '50%/x')
    """
    if not name or "\0" in name:
        raise GeomprobeError(f"{name!r} cannot name a dataset: rename the parameter or reference")
    if name in (".", ".."):
        return name.replace(".", "%2E")
    return name.replace("%", "%25").replace("/", "%2F")


def unescape(component: str) -> str:
    """The name behind a path component that `escape` made.

    >>> unescape("a%2Fb")
    'a/b'
    """
    return unquote(component)


def group_column(index: int, quantity: str) -> str:
    """Path of a parameter group's column.

    >>> group_column(0, "lr")
    'groups/0/lr'
    """
    return f"groups/{index}/{quantity}"


def product_column(product: str, reference: str = FINAL) -> str:
    """Path of an inner product against a reference; the final iterate's are at the top.

    >>> product_column("g.d"), product_column("g.d", "best")
    ('inner_products/g.d', 'references/best/inner_products/g.d')
    """
    if reference == FINAL:
        return f"inner_products/{product}"
    return f"references/{escape(reference)}/inner_products/{product}"


def parameter_column(parameter: str, product: str) -> str:
    """Path of one parameter tensor's inner product.

    >>> parameter_column("fc.weight", "g.d")
    'parameters/fc.weight/g.d'
    """
    return f"parameters/{escape(parameter)}/{product}"


def reference_file(name: str) -> str:
    """File name, under ``stream/``, of a reference that was taken but not yet sealed into the record.

    >>> reference_file("final")
    'reference-final.h5'
    """
    return f"{REFERENCE_PREFIX}{quote(name, safe='')}.h5"


def canonical(path: str) -> str:
    """The path under which a column is computed: the final iterate's quantities live at the top.

    >>> canonical("references/final/cosine"), canonical("references/final/inner_products/g.d")
    ('steps/cosine', 'inner_products/g.d')
    """
    prefix = f"references/{FINAL}/"
    if not path.startswith(prefix):
        return path
    rest = path[len(prefix) :]
    return rest if rest.startswith("inner_products/") else f"steps/{rest}"


def input_path(path: str, name: str, known: Container[str] = ()) -> str:
    """Where the input ``name`` of the derived column at ``path`` is.

    The loss, the learning rate and the gradient of a reference's columns are the step's own. ``known`` are the columns
    that the trace has.

    >>> input_path("references/best/cosine", "g.d"), input_path("references/best/cosine", "g.g")
    ('references/best/inner_products/g.d', 'inner_products/g.g')
    >>> input_path("held_out/cosine", "g.g"), input_path("steps/relative_residual", "lr")
    ('held_out/inner_products/g.g', 'groups/0/lr')
    """
    group = path.rpartition("/")[0]
    if name == "loss":
        return "steps/loss"
    if name == "lr":
        return MOVING_LR if MOVING_LR in known else group_column(0, "lr")
    own = group in ORACLES or (group != STEPS and "d" in name.split("."))
    return f"{group}/inner_products/{name}" if own else f"inner_products/{name}"


def describe(path: str) -> Column:
    """The column at a dataset path of a sealed trace; a bare name is one of ``/steps``.

    Raises:
        UnknownColumn: nothing by that name is part of the format.

    >>> describe("references/best/cosine").units, describe("loss").units
    ('1', 'loss')
    """
    path = path if "/" in path else f"steps/{path}"
    name = path.rpartition("/")[2]
    found = {column.name: column for column in _columns_at(path)}
    if name not in found:
        hint = f"; there is {', '.join(near(name, found) or found)}" if found else ""
        raise UnknownColumn(f"{path!r} is no column of a trace{hint}")
    return found[name]


def is_column(path: str) -> bool:
    """Whether there can be a column at a dataset path of a sealed trace.

    >>> is_column("inner_products/g.d"), is_column("inner_products/step")
    (True, False)
    """
    return path.rpartition("/")[2] in {column.name for column in _columns_at(path)}


def check_raw(path: str) -> None:
    """Refuse a path that a pass may not stream, because it is unknown or derived from others.

    Raises:
        UnknownColumn: with what may be streamed there.

    >>> check_raw("inner_products/g.d")
    """
    if "/" not in path:  # a bare name is for readers
        raise UnknownColumn(f"{path!r} is no column of a trace; give its whole path, such as steps/{path}")
    column = describe(path)
    if column.compute is not None or path == "steps/step":
        raise UnknownColumn(f"{path!r} is derived from the inner products; stream those instead")


def near(name: str, names: Iterable[str]) -> list[str]:
    """Names that look like a mistyped one, best first; a bare name also matches the end of a path.

    >>> near("cosin", ["cosine", "loss"]), near("g.d", ["inner_products/g.d"])
    (['cosine'], ['inner_products/g.d'])
    """
    known = list(names)
    ends = [path for path in known if path.endswith(f"/{name}")]
    return (ends + [match for match in difflib.get_close_matches(name, known) if match not in ends])[:5]


def _columns_at(path: str) -> tuple[Column, ...]:
    match path.split("/"):
        case ["steps", _]:
            return (*STEP_COLUMNS, *OPTIONAL_STEP_COLUMNS)
        case ["groups", index, _] if index.isdecimal():
            return GROUP_COLUMNS
        case ["groups", "moving", _]:
            return _OF_MOVING
        case [group, *products, _] if group in ORACLES and products in ([], ["inner_products"]):
            return ORACLE_PRODUCTS if products else ORACLES[group]
        case ["inner_products", _] | ["parameters", _, _]:
            return INNER_PRODUCTS
        case ["ranks", rank, _] if rank.isdecimal():
            return INNER_PRODUCTS
        case ["references", _, _]:
            return REFERENCE_COLUMNS
        case ["references", _, "inner_products", _]:
            return REFERENCE_PRODUCTS
    return ()

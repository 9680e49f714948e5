"""Arguments that a dynamic backbone hands on to the static one, checked before it is built."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence

_DEFORMABLE = "dynamic blocks have no deformable convolutions; leave it out"
_ATTENTION = "dynamic blocks take no modules between their convolutions; leave it out"
_GROUPS = "blocks with grouped convolutions are those of las_mm.LASRegNet; leave it out"
# Arguments of mmdet's, mmseg's and mmpretrain's other ResNets and RegNets, and what to do instead.
ALTERNATIVES = dict(
    pretrained="use init_cfg=dict(type='Pretrained', checkpoint=...) instead",
    dcn=_DEFORMABLE,
    stage_with_dcn=_DEFORMABLE,
    plugins=_ATTENTION,
    gcb=_ATTENTION,
    stage_with_gcb=_ATTENTION,
    gen_attention=_ATTENTION,
    stage_with_gen_attention=_ATTENTION,
    sac=_DEFORMABLE,
    stage_with_sac=_DEFORMABLE,
    groups=_GROUPS,
    base_width=_GROUPS,
    width_per_group=_GROUPS,
    multi_grid="give dilations, one per stage, instead",
    contract_dilation="give dilations, one per stage, instead",
)
# Without the second, the first changes nothing, whatever it is.
_NEEDS = dict(
    stage_with_dcn="dcn",
    stage_with_gcb="gcb",
    stage_with_gen_attention="gen_attention",
    stage_with_sac="sac",
    base_width="groups",
    width_per_group="groups",
)


def static_arguments(backbone: type, static: type, given: dict) -> dict:
    """What the constructor of the static backbone gets, of arguments that a config gives.

    Arguments of mm packages' other backbones are taken, and left out, where they ask for nothing:
    ``dcn=None``, ``plugins=[]``, ``groups=1``, ...

    Args:
        backbone: The class that the config names.
        static: The static backbone.
        given: The arguments that ``backbone`` does not have by itself.

    Raises:
        ValueError: An argument asks for something that a dynamic backbone has not, or is no bool;
            the message names it and the alternative.
        TypeError: There is no such argument; the message names close ones.
    """
    own = inspect.signature(static.__init__).parameters
    arguments = {}
    for name, value in given.items():
        if name in own:
            if isinstance(own[name].default, bool):
                require_bool(name, value)
            _check_range(name, value)
            arguments[name] = value
        elif name not in ALTERNATIVES:
            raise TypeError(_unknown(backbone, name))
        elif not _asks_for_nothing(name, value, given):
            raise ValueError(
                f"{name}={value!r} is no argument of {backbone.__name__}: {ALTERNATIVES[name]}"
            )
    if arguments.get("stem_channels", 0) is None:  # mmdet's: as many as the first stage has
        del arguments["stem_channels"]
        if "base_channels" in arguments:
            arguments["stem_channels"] = arguments["base_channels"]
    style = arguments.get("style", "pytorch")
    if style not in ("pytorch", "caffe"):
        raise ValueError(f"style must be 'pytorch' or 'caffe', got {style!r}")
    return arguments


def require_bool(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is True or False: a text such as 'no' would be taken as
    True."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


_COUNTS = ("in_channels", "stem_channels", "base_channels", "bn_size")
_SHARES = ("drop_rate", "drop_path_rate")


def _check_range(name: str, value: object) -> None:
    """Raise ValueError for a value that the static backbone takes, or trips over, unseen."""
    if name in _COUNTS and value is not None and not _whole(value, 1):
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if name in _SHARES and (isinstance(value, bool) or not _between(value, 0, 1)):
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
    if name in ("norm_cfg", "act_cfg") and not (isinstance(value, Mapping) and "type" in value):
        raise ValueError(
            f"{name} must be a dict with a type, such as {_EXAMPLES[name]}, got {value!r}"
        )
    if name == "conv_cfg" and value is not None and not isinstance(value, Mapping):
        raise ValueError(f"conv_cfg must be None or a dict, got {value!r}")
    if name in ("strides", "dilations"):
        if not isinstance(value, (list, tuple)) or not all(_whole(n, 1) for n in value):
            raise ValueError(f"{name} must be positive integers, one per stage, got {value!r}")
    if name == "frozen_stages" and not _whole(value, -1):
        raise ValueError(f"frozen_stages must be an integer, -1 for none, got {value!r}")


_EXAMPLES = dict(norm_cfg="dict(type='BN')", act_cfg="dict(type='ReLU')")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _between(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and low <= value <= high


def check_out_indices(out_indices: object, num_stages: int) -> None:
    """Raise ValueError unless these are stages, counted from 0, in a list or tuple."""
    if not isinstance(out_indices, (list, tuple)) or not out_indices:
        raise ValueError(
            f"out_indices must be a tuple of stages, such as ({num_stages - 1},), got "
            f"{out_indices!r}"
        )
    for index in out_indices:
        if not _whole(index, 0) or index >= num_stages:
            raise ValueError(f"out_indices must name stages 0 to {num_stages - 1}, got {index!r}")


def check_stages(num_stages: int, static: type, given: dict) -> None:
    """Raise ValueError where arguments or the static backbone's defaults do not fit the stages."""
    if not _whole(num_stages, 1) or num_stages > 4:
        raise ValueError(f"num_stages must be 1 to 4, got {num_stages!r}")

    def value(name: str):
        return given.get(name, inspect.signature(static.__init__).parameters[name].default)

    for name in ("strides", "dilations"):
        if len(value(name)) != num_stages:
            raise ValueError(
                f"{name} needs {num_stages} values (one per stage of this network), got "
                f"{tuple(value(name))}"
            )
    check_out_indices(value("out_indices"), num_stages)
    if value("frozen_stages") > num_stages:
        raise ValueError(f"frozen_stages must be -1 to {num_stages}, got {value('frozen_stages')}")


def dilations_of_blocks(
    count: int, dilation: int, contract: bool, multi_grid: Sequence[int] | None
) -> list[int]:
    """The dilation of each block of a stage, as mmseg's ResNet has it.

    Args:
        count: Blocks.
        dilation: Of the stage.
        contract: Whether the first block has half of a dilation greater than 1.
        multi_grid: Instead, the dilation of each block.

    Raises:
        ValueError: ``multi_grid`` has another length, or is not of positive integers.
    """
    if multi_grid is None:
        return [dilation // 2 if contract and dilation > 1 else dilation, *[dilation] * (count - 1)]
    whole = all(isinstance(d, int) and d > 0 for d in multi_grid)
    if len(multi_grid) != count or not whole:
        raise ValueError(
            f"multi_grid needs {count} positive integers (one per block of the last stage), got "
            f"{tuple(multi_grid)}"
        )
    return list(multi_grid)


def _asks_for_nothing(name: str, value: object, given: dict) -> bool:
    if name in _NEEDS and _asks_for_nothing(_NEEDS[name], given.get(_NEEDS[name]), given):
        return True
    if name == "groups":
        return value in (None, 1)
    if isinstance(value, (list, tuple)):
        return not any(value)
    return value is None or value is False or value == {}


def _unknown(backbone: type, name: str) -> str:
    known: dict[str, None] = {}
    for base in backbone.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            keywords = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
            known.update(dict.fromkeys(keywords[1:]))
            if all(p.kind != p.VAR_KEYWORD for p in parameters):
                break
    close = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known)}"
    return f"{backbone.__name__} has no argument {name!r}; {hint}"

"""LAUDNet's T2T-ViT: mmpretrain's T2T_ViT with dynamic layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from mmpretrain.models.backbones import T2T_ViT
from mmpretrain.models.utils import MultiheadAttention, resize_pos_embed
from torch import Tensor, nn

from las_mm import compat
from las_mm.models.arguments import require_bool, static_arguments
from las_mm.models.backbone import DynamicBackbone
from las_mm.models.coverage import shadowed
from las_mm.models.interception import foreign
from las_mm.models.released.transformer import convert_on_load
from las_mm.models.snapshot import has_hooks
from las_mm.models.token_settings import layer_settings
from las_mm.models.token_stem import token_stem_shapes, use_performer
from las_mm.models.transformer_layer import DynamicTransformerLayer, as_dynamic
from las_mm.network.block import NetworkShape
from las_mm.registry import MODELS

_SCALES = ("published", "mmpretrain")
_SIZES = ("embed_dims", "num_layers", "num_heads", "feedforward_channels")
DEFAULT = "t2t-vit-19"
ARCHS = {
    "t2t-vit-14": dict(embed_dims=384, num_layers=14, num_heads=6),
    "t2t-vit-19": dict(embed_dims=448, num_layers=19, num_heads=7),
}


@MODELS.register_module()
class LAUDT2TViT(DynamicBackbone, T2T_ViT):
    """T2T-ViT whose layers decide per image which tokens, heads and halves to compute.

    LAUDNet (arXiv 2308.15949, section 3) on T2T-ViT (arXiv 2101.11986), with the policies of
    AdaViT (arXiv 2111.15668). Parameter names are those of mmpretrain's ``T2T_ViT``; checkpoints
    of T2T-ViT's and AdaViT's authors load as they are, their names are converted. Use it in any mm
    project as ``backbone=dict(type='las_mm.LAUDT2TViT', arch='t2t-vit-19')``.

    Args:
        arch: ``'t2t-vit-14'``, ``'t2t-vit-19'``, or a dict of ``embed_dims``, ``num_layers``,
            ``num_heads`` and, by default 3 * ``embed_dims``, ``feedforward_channels``.
        mode: ``'static'``, or what layers decide about: some of ``token``, ``head``,
            ``attention``, ``mlp`` and ``layer`` (attention and MLP, each for itself) joined by
            ``+``. One for all but the first ``static_layers``, or a list of one per layer.
            Defaults to all of them.
        static_layers: First layers that decide about nothing, where ``mode`` is one for all.
            Defaults to 1.
        head_in_mlp: Whether skipped heads close their channels in the MLP too: ``'none'``,
            ``'input'`` or ``'hidden'``, see :class:`TransformerSettings`. Defaults to ``'none'``.
        with_cp: Whether to recompute layers in the backward pass. Defaults to ``False``.
        attention_scale: ``'published'``: scores over sqrt(D), as the papers' networks. Or
            ``'mmpretrain'``: whatever mmpretrain's ``T2T_ViT`` of the installed version does, which
            in 1.x is, by mistake, *times* sqrt(D); its own published checkpoints are older and
            need ``'published'``. Defaults to ``'published'`` with a performer, and to
            ``'mmpretrain'`` with ``t2t_cfg=dict(use_performer=False)``.
        runtime: See :class:`LASResNet`.
        kwargs: Arguments of mmpretrain's ``T2T_ViT``: ``img_size``, ``drop_path_rate``,
            ``out_type``, ``t2t_cfg``, ... The attention of the tokens-to-token module is a
            performer, as in the published T2T-ViT-14 and 19 (8.5 G multiply-accumulates), unless
            ``t2t_cfg=dict(use_performer=False)`` asks for softmax attention, as in mmpretrain's
            checkpoints (T2T-ViT_t).

    Raises:
        ValueError: Wrong arch, mode, ...; the message names the value.
        TypeError: An unknown argument; the message names close ones.

    Examples:
        >>> import torch
        >>> from las_mm.models import LAUDT2TViT, collect_activations
        >>> arch = dict(embed_dims=64, num_layers=4, num_heads=4)
        >>> backbone = LAUDT2TViT(arch, img_size=64).eval()
        >>> tuple(backbone(torch.rand(2, 3, 64, 64))[0].shape)
        (2, 64)
        >>> sorted(collect_activations(backbone).axes)
        ['attention', 'head', 'mlp', 'token']
    """

    static_forward = T2T_ViT.forward
    why_stem_dense = "no part of the tokens-to-token module is left out"
    arch_settings = ARCHS
    res_layers = ("encoder",)

    def __init__(
        self,
        arch: str | Mapping = DEFAULT,
        mode: str | Sequence[str] = "token+head+layer",
        static_layers: int = 1,
        head_in_mlp: str = "none",
        with_cp: bool = False,
        attention_scale: str | None = None,
        runtime: str = "auto",
        **kwargs,
    ) -> None:
        sizes = sizes_of(arch)
        require_bool("with_cp", with_cp)
        given, performer = static_backbone_arguments(sizes, static_arguments_of(type(self), kwargs))
        layers = given["num_layers"]
        own = layer_settings(layers, mode, head_in_mlp, static_layers)
        self.settings = (own,)  # type: ignore[assignment]
        super().__init__(**given)
        self.arch = arch if isinstance(arch, str) else "custom"
        self.in_channels = given.get("in_channels", 3)
        if attention_scale not in (None, *_SCALES):
            raise ValueError(
                f"attention_scale must be None or one of {', '.join(_SCALES)}, got "
                f"{attention_scale!r}"
            )
        if performer:
            use_performer(self.tokens_to_token)
        cfgs = given["layer_cfgs"]
        for i, static in enumerate(self.encoder):
            cfg = {
                "embed_dims": given["embed_dims"],
                "qkv_bias": False,
                "norm_cfg": given.get("norm_cfg", dict(type="LN")),
                **(cfgs[i] if isinstance(cfgs, Sequence) else cfgs),
            }
            self.encoder[i] = as_dynamic(static, own[i], with_cp, cfg)
        self.attention_scale = attention_scale or _SCALES[not performer]
        if self.attention_scale == "published":
            divide_by_sqrt(self)
        self.runtime = runtime
        self._register_load_state_dict_pre_hook(convert_on_load)

    @property
    def architecture(self) -> str:
        """See the base class."""
        if self.arch in self.arch_settings:
            return f"T2T-ViT-{self.depth}"
        return f"T2T-ViT-{self.depth}x{self.channels}"

    @property
    def depth(self) -> int:
        """Layers of the encoder."""
        return len(self.encoder)

    def _stem_parts(self) -> list[str]:
        return ["tokens_to_token"]

    def _network_shape(self, input_hw: tuple[int, int]) -> NetworkShape:
        stem, hw = token_stem_shapes(self.tokens_to_token, self.in_channels, input_hw)
        blocks = [layer.describe(f"encoder.{i}", 1, hw) for i, layer in enumerate(self.blocks())]
        return NetworkShape(self.architecture, input_hw, stem, tuple(blocks))

    def _infer(
        self, x: Tensor, observe: Callable[[nn.Module], None] | None = None
    ) -> tuple[Tensor, ...]:
        if compat.is_compiling():
            return T2T_ViT.forward(self, x)
        observe = observe or (lambda module: None)
        x, hw = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        sizes = (self.pos_embed, self.patch_resolution, hw)
        x = x + resize_pos_embed(*sizes, self.interpolate_mode, self.num_extra_tokens)
        x = self.drop_after_pos(x)
        observe(self)
        outs, mine, last = [], False, len(self.encoder) - 1
        for i, layer in enumerate(self.encoder):
            known = isinstance(layer, DynamicTransformerLayer) and foreign(x) is None
            if known and not has_hooks(layer) and shadowed(layer) is None:
                x = layer.infer(x, mine)
                mine = layer.why_dense is None and not layer.hooked_inside()
            else:
                x, mine = layer(x), False
            observe(layer)
            if i == last and self.final_norm:
                x, mine = self.norm(x), False
            if i in self.out_indices:
                outs.append(self._format_output(x, hw))
                mine = False  # what was given out may be a view
        return tuple(outs)


def divide_by_sqrt(backbone: nn.Module) -> None:
    """Let all attention inside divide its scores by sqrt(D), as published.

    In the tokens-to-token module D is the width of a head's input, as its authors have it.
    """
    for module in backbone.modules():
        if isinstance(module, MultiheadAttention):
            function = F.scaled_dot_product_attention
            if module.v_shortcut:
                scale = (module.input_dims // module.num_heads) ** -0.5
                function = partial(function, scale=scale)
            module.scaled_dot_product_attention = function


def static_arguments_of(backbone: type, kwargs: dict) -> dict:
    """The arguments of mmpretrain's ``T2T_ViT`` among ``kwargs``, checked."""
    given = static_arguments(backbone, T2T_ViT, kwargs)
    for name in ("embed_dims", "num_layers"):
        if name in given:
            raise ValueError(f"{name} is part of arch, e.g. arch=dict({name}={given[name]!r}, ...)")
    if given.get("with_cls_token", True) is not True:
        raise ValueError(
            "with_cls_token must be True: maskers of heads and layers read the class token, got "
            f"{given['with_cls_token']!r}"
        )
    if isinstance(given.get("out_indices"), tuple):
        given["out_indices"] = list(given["out_indices"])  # the parent writes into it
    return given


def static_backbone_arguments(sizes: Mapping, given: Mapping) -> tuple[dict, bool]:
    """What mmpretrain's ``T2T_ViT`` is built with, and whether its stem becomes a performer.

    Args:
        sizes: Of the arch.
        given: Arguments of ``T2T_ViT``.
    """
    sizes = dict(sizes)
    hidden = sizes.pop("feedforward_channels", 3 * sizes["embed_dims"])
    layer = dict(num_heads=sizes.pop("num_heads"), feedforward_channels=hidden)
    own = given.get("layer_cfgs", {})
    cfgs = [{**layer, **cfg} for cfg in own] if isinstance(own, Sequence) else {**layer, **own}
    t2t = dict(given.get("t2t_cfg", {}))
    performer = t2t.pop("use_performer", True)
    require_bool("use_performer of t2t_cfg", performer)
    return {**given, **sizes, "t2t_cfg": t2t, "layer_cfgs": cfgs}, performer


def sizes_of(arch: object) -> dict:
    """Embedding, layers, heads and perhaps the MLP's width of ``arch``.

    Raises:
        ValueError: It is unknown, or a size is missing or no positive integer.
    """
    if isinstance(arch, str) and arch.lower() in ARCHS:
        return dict(ARCHS[arch.lower()])
    sizes = dict(arch) if isinstance(arch, Mapping) else {}
    needed = set(sizes) | {"feedforward_channels"} == set(_SIZES)
    positive = all(type(size) is int and size > 0 for size in sizes.values())
    if not needed or not positive:
        raise ValueError(
            f"arch of LAUDT2TViT must be one of {', '.join(ARCHS)}, or a dict of "
            "embed_dims, num_layers, num_heads and perhaps feedforward_channels, positive "
            f"integers, got {arch!r}"
        )
    if sizes["embed_dims"] % sizes["num_heads"]:
        raise ValueError(f"num_heads of arch must divide its embed_dims, got {arch!r}")
    return sizes


def plain_t2t(config: Mapping) -> T2T_ViT:
    """The static network of mmpretrain with the parameter names of a ``LAUDT2TViT``.

    Args:
        config: What the latter is built from.
    """
    known = inspect.signature(T2T_ViT.__init__).parameters
    own = {key: value for key, value in config.items() if key in known}
    sizes = sizes_of(config.get("arch", DEFAULT))
    given, performer = static_backbone_arguments(sizes, static_arguments_of(LAUDT2TViT, own))
    network = T2T_ViT(**given)
    if performer:
        use_performer(network.tokens_to_token)
    if (config.get("attention_scale") or _SCALES[not performer]) == "published":
        divide_by_sqrt(network)
    return network

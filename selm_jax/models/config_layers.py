"""Reads and writes the properties of layers in a `config.json` that several families share."""

from __future__ import annotations

from selm_jax.models.config import DecoderConfig, LayerKind, Rope, UnsupportedModel, Yarn
from selm_jax.models.config_keys import Json, Keys
from selm_jax.models.config_rope import rope_of


def all_alike(c: Json, rope: Rope, window: int | None = None) -> Json:
    return {"kinds": (LayerKind(rope, window),) * c["layers"]}


def biases_from(k: Keys) -> Json:
    attention, mlp = k.flag("attention_bias"), k.flag("mlp_bias")
    return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": mlp}


def biases_to(c: DecoderConfig) -> Json:
    return {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def upper_windows(k: Keys, c: Json, rope: Rope) -> Json:
    """Qwen's rule: with `use_sliding_window`, layers from `max_window_layers` on have a window."""
    n, lower = c["layers"], k.count("max_window_layers", 28)
    window = window_if(k, 4096)
    types = k.texts("layer_types") or [
        "full_attention" if i < lower else "sliding_attention" for i in range(n)
    ]
    return {"kinds": tuple(LayerKind(rope, w) for w in windows_of(types, window, n))}


def window_if(k: Keys, default: int | None) -> int | None:
    """The size of the window if `use_sliding_window` is true; otherwise None."""
    window = k.size("sliding_window", default, null=True)
    return window if k.flag("use_sliding_window") else None


def alternating(layers: int, every: int) -> list[str]:
    """Layer types where one layer in `every` has full attention and the others a window."""
    kinds = "full_attention", "sliding_attention"
    return [kinds[(i + 1) % every != 0] for i in range(layers)]


def windows_of(types: list[str], window: int | None, layers: int) -> list[int | None]:
    known = {"full_attention": None, "sliding_attention": window}
    if len(types) != layers or not set(types) <= set(known):
        raise UnsupportedModel(
            f"config.json: layer_types is {types!r:.200}; expected a list of {layers} "
            f"entries, each one of {', '.join(known)}"
        )
    return [known[t] for t in types]


def kinds_of(
    types: list[str], window: int | None, ropes: dict[str, Rope], c: Json
) -> tuple[LayerKind, ...]:
    """The kind of each layer, where a layer's type says both its window and its rope."""
    windows = windows_of(types, window, c["layers"])
    return tuple(LayerKind(ropes[t], w) for t, w in zip(types, windows, strict=True))


def ropes_by_type(k: Keys, full: float, sliding: float) -> dict[str, Rope]:
    """Reads one `Rope` for each type of layer.

    Earlier versions of transformers store only the scaling of full attention, as `rope_scaling`.

    Args:
      k: the keys.
      full, sliding: the base of each type if its parameters do not say it.
    """
    nested = k.object("rope_parameters")
    if unknown := sorted(set(nested) - {"full_attention", "sliding_attention"}):
        raise UnsupportedModel(
            f"config.json: rope_parameters has {', '.join(unknown)!r:.60}; expected one object for "
            "full_attention and one for sliding_attention"
        )
    ropes = {
        "full_attention": rope_of(
            nested.get("full_attention") or k.object("rope_scaling"), full, k
        ),
        "sliding_attention": rope_of(nested.get("sliding_attention") or {}, sliding, k),
    }
    if any(isinstance(r.scaling, Yarn) and not r.scaling.truncate for r in ropes.values()):
        raise UnsupportedModel(
            "config.json: rope_parameters has truncate false, which transformers ignores where "
            "types of layers differ in rope. Remove it, or use another model"
        )
    return ropes


def layer_types_to(c: DecoderConfig) -> Json:
    windows = [kind.window for kind in c.kinds if kind.window is not None]
    return {
        "layer_types": [
            "full_attention" if kind.window is None else "sliding_attention" for kind in c.kinds
        ],
        "sliding_window": windows[0] if windows else None,
    }


def switched_windows_to(c: DecoderConfig) -> Json:
    hf = layer_types_to(c)
    return hf | {"use_sliding_window": hf["sliding_window"] is not None}

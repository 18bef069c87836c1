"""Which decoder layers a recipe means, for a model of a given depth. Needs no torch.

probed_layers("0.33:0.66", num_layers=30)      # sap.layers
read_layer(0.5, num_layers=30)                 # saft.layer
"""

from __future__ import annotations


def probed_layers(layers: str | list[int] | list[float], num_layers: int) -> list[int]:
    """Indices of the probed decoder layers, ascending, for a model of `num_layers`.

    layers: [10, 11] indices; [0.3, 0.5] fractions of the depth; 'start:stop' a half-open range of either.
    Raises ValueError where one lies outside the model or none is left.
    """

    def index(value: float | int, what: str) -> int:
        result = round(value * num_layers) if isinstance(value, float) else value
        if not 0 <= result <= num_layers or (isinstance(value, float) and not 0 <= value <= 1):
            raise ValueError(
                f"sap.layers names {what}, but the model has the layers 0 to {num_layers - 1}: use "
                "those, or fractions between 0 and 1"
            )
        return result

    if isinstance(layers, str):
        start, stop = (float(part) if "." in part else int(part) for part in layers.split(":"))
        found = list(range(index(start, layers), index(stop, layers)))
    else:
        found = sorted(
            {
                min(index(value, str(value)), num_layers - 1)
                if isinstance(value, float)
                else index(value, str(value))
                for value in layers
            }
        )
    if not found or found[-1] >= num_layers:
        raise ValueError(
            f"sap.layers {layers} leaves no layer or one outside the model, which has the layers 0 to {num_layers - 1}"
        )
    return found


def read_layer(layer: int | float, num_layers: int) -> int:
    """The index that saft.layer means in a model of `num_layers` decoder layers.

    ValueError where it has no such layer.
    """
    index = layer if isinstance(layer, int) else int(layer * num_layers)
    if index >= num_layers:
        raise ValueError(
            f"saft.layer {layer} is outside the model: it has decoder layers 0 to "
            f"{num_layers - 1}, or give a fraction of the depth such as 0.5"
        )
    return index

"""The base's other files: most are copied as they are; some name layers, and follow the map or are
left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_cli.errors import CheckpointError, ConfigError, shown, shown_list
from dus_cli.maps.architectures import LAYER_STACKS
from dus_cli.maps.layers import LayerMap
from dus_cli.maps.naming import NumberedNames, follow_settings
from dus_cli.source.belonging import OF_OTHER_LAYERS, SIDECARS, Carried
from dus_cli.source.json_objects import limit_nesting, parse_json_object
from dus_cli.source.reading import read_small_file

_MAX_BYTES = 16_000_000


@dataclass(frozen=True)
class Along:
    """What becomes of the base's other files.

    Attributes:
        files: files that are copied, as (path with "/", file).
        records: contents of files whose layer names followed the map, by file name.
        left_out: files that are left out.
        warnings: why some are.
    """

    files: tuple[tuple[str, Path], ...]
    records: dict[str, dict[str, Any]]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


def go_along(carried: Carried, layer_map: LayerMap, names: NumberedNames) -> Along:
    """Decide what becomes of the base's other files. `names` are the checkpoint's numbered names.

    Raises:
        CheckpointError: a file that names layers cannot be read.
    """
    names = NumberedNames(names.stack, names.others, (*LAYER_STACKS, *names.known))
    files: list[tuple[str, Path]] = []
    records: dict[str, dict[str, Any]] = {}
    left_out, warnings = list(carried.left_out), list[str]()
    for name, path in carried.files:
        if name.lower() not in SIDECARS or not path.exists():
            files.append((name, path))
            continue
        raw = read_small_file(path, shown(name), _MAX_BYTES)
        try:
            record = parse_json_object(raw, shown(name))
            limit_nesting(record, shown(name))
            followed = follow_settings(record, layer_map, names, name)
        except (CheckpointError, ConfigError) as error:
            left_out.append(name)
            # --assume is only for config.json
            why = str(error).partition("; give --assume")[0]
            warnings.append(
                f"{shown(name)} stays behind, because what it says of layers cannot follow: {why}"
            )
            continue
        if followed == record:
            files.append((name, path))
        else:
            records[name] = followed
    if of_the_base := [name for name in carried.left_out if name.lower() in OF_OTHER_LAYERS]:
        warnings.append(f"{shown_list(of_the_base)} stays behind: it tells of the base's layers")
    return Along(tuple(files), records, tuple(sorted(left_out)), tuple(warnings))

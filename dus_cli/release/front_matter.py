"""A model card's metadata (front matter) as text: where it is, and where the lines of a field are.

A field is replaced in the text, so that an edited card keeps every other byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

RESULTS = "model-index"

FRONT = re.compile(
    r"\A(\ufeff?---[ \t]*(\r?\n))(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE
)


def field_span(front: str, name: str) -> tuple[int, int]:
    r"""The start and end of a field's lines in the front matter; its end twice without the field.

    Raises:
        yaml.YAMLError: it is not valid YAML.

    >>> front = "license: mit\nmodel-index:\n- name: x\n# of tags\ntags: [a]\n"
    >>> front[slice(*field_span(front, "model-index"))]
    'model-index:\n- name: x\n'
    """
    root = yaml.compose(front, Loader=yaml.SafeLoader)
    fields = root.value if isinstance(root, yaml.MappingNode) else []
    pairs = [pair for pair in fields if pair[0].value == name]
    if not pairs:
        return len(front), len(front)
    key, value = pairs[0]
    # A block's end mark is where the next field begins, but comments between them are not part of
    # the field: so the end of its last item is used.
    last = max([key.end_mark.index, *_ends(value)])
    end = front.find("\n", last)
    return key.start_mark.index, len(front) if end < 0 else end + 1


def without_results(card: str) -> str:
    r"""A card without its evaluation results. A card with invalid metadata is returned unchanged.

    >>> without_results("---\nlicense: mit\nmodel-index:\n- name: x\n---\n# A model\n")
    '---\nlicense: mit\n---\n# A model\n'
    """
    match = FRONT.match(card)
    if match is None:
        return card
    front = match.group(3)
    try:
        start, end = field_span(front, RESULTS)
    except (yaml.YAMLError, ValueError, RecursionError):
        return card
    return card[: match.start(3)] + front[:start] + front[end:] + card[match.end(3) :]


def _ends(node: yaml.Node) -> Iterator[int]:
    if isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        for part in node.value:
            for child in part if isinstance(part, tuple) else (part,):
                yield from _ends(child)
    else:
        yield node.end_mark.index

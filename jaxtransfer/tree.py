"""Parameter trees: paths, rules on paths, what is trained and what is held.

A tree is a nested dict with string keys; the path of a leaf is its keys joined by
``/`` (``"block1/conv/kernel"``). A *rule* is a regular expression that must match the
whole path (``"head/.*"``), or a whole prefix of it that ends at a ``/`` (``"head"``
selects everything under ``head``).
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Rules = str | Sequence[str]
_Keys = tuple[str, ...]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a nested dict to ``{path: leaf}``.

    Args:
        tree: nested dict with string keys.

    Returns:
        Leaves by path, in sorted order of the path. Empty dicts vanish.

    Raises:
        TypeError: it is no dict, or a key no string.

    Example:
        >>> flatten({"head": {"kernel": 1, "bias": 2}})
        {'head/bias': 2, 'head/kernel': 1}
    """
    return {"/".join(keys): leaf for keys, leaf in _leaves(tree).items()}


def _leaves(tree: Mapping[str, Any]) -> dict[_Keys, Any]:
    """By their keys: one may have a ``/`` in it, as those of Linen's WeightNorm."""
    leaves: dict[_Keys, Any] = {}

    def visit(node: Any, path: _Keys) -> None:
        if isinstance(node, Mapping):
            for name in node:
                if not isinstance(name, str):
                    raise TypeError(
                        f"tree: keys must be strings, got {name!r} under "
                        f"{'/'.join(path)!r}; from_nnx names items of a list 'list_0'"
                    )
            for name in sorted(node):
                visit(node[name], (*path, name))
        else:
            leaves[path] = node

    if not isinstance(tree, Mapping):
        raise TypeError(
            f"tree: got a {type(tree).__name__}; parameters are nested dicts of "
            "arrays, so name the items of a list"
        )
    visit(tree, ())
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Rebuild the nested dict of ``{path: leaf}``; inverse of :func:`flatten`.

    Raises:
        ValueError: a path is a leaf and a branch at once.

    Example:
        >>> unflatten({"head/bias": 2, "head/kernel": 1})
        {'head': {'bias': 2, 'kernel': 1}}
    """
    return _nested({tuple(path.split("/")): leaf for path, leaf in leaves.items()})


def _nested(leaves: Mapping[_Keys, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for keys, leaf in leaves.items():
        *parents, name = keys
        node = tree
        for depth, parent in enumerate(parents, 1):
            if keys[:depth] in leaves:
                raise ValueError(
                    f"path {'/'.join(keys[:depth])!r} is a leaf, and a branch with "
                    f"{'/'.join(keys)!r}; rename one of the two"
                )
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def nearest(wanted: str, known: Iterable[str], *, most: int = 3) -> str:
    """Name the known names closest to a wrong one, for error messages.

    Example:
        >>> nearest("hed/kernel", ["head/kernel", "stem/kernel"], most=1)
        "'head/kernel'"
    """
    known = list(known)
    literal = re.sub(r"[^\w/]+", "", wanted)
    found = difflib.get_close_matches(literal, known, n=most, cutoff=0.3)
    return ", ".join(repr(name) for name in (found or known[:most])) or "none"


def _compile(rule: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:{rule})(?:/.*)?")
    except re.error as error:
        raise ValueError(
            f"rule {rule!r} is not a regular expression: {error}. "
            "Rules are matched against whole paths such as 'block1/conv/kernel'."
        ) from error


def match(rules: Rules, paths: Iterable[str]) -> set[str]:
    """Select the paths that at least one rule matches.

    Args:
        rules: one regular expression or several; each must match a whole path or a
            whole leading part of it.
        paths: the paths to choose from.

    Returns:
        The chosen paths.

    Raises:
        ValueError: a rule matches nothing (the message names the nearest paths), or
            is not a regular expression.

    Example:
        >>> sorted(match("head", ["head/bias", "head/kernel", "stem/kernel"]))
        ['head/bias', 'head/kernel']
    """
    paths = list(paths)
    chosen: set[str] = set()
    for rule in [rules] if isinstance(rules, str) else rules:
        pattern = _compile(rule)
        hits = {path for path in paths if pattern.fullmatch(path)}
        if not hits:
            raise ValueError(
                f"rule {rule!r} matches no parameter; nearest: {nearest(rule, paths)}"
            )
        chosen |= hits
    return chosen


def partition(
    tree: Mapping[str, Any], rules: Rules
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a tree in two by path rules: what is trained and what is held.

    Args:
        tree: nested dict of arrays.
        rules: what is trained; see :func:`match`. ``()`` selects nothing.

    Returns:
        ``(trained, held)``: nested dicts that hold each leaf exactly once.

    Raises:
        ValueError: a rule matches no leaf.

    Example:
        >>> partition({"stem": {"w": 1}, "head": {"w": 2}}, "head")
        ({'head': {'w': 2}}, {'stem': {'w': 1}})
    """
    return divide(tree, match(rules, flatten(tree)))


def divide(
    tree: Mapping[str, Any], paths: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a tree in two by the paths of leaves.

    Args:
        tree: nested dict of arrays.
        paths: those of the first part; what is no path of the tree is ignored.

    Returns:
        ``(chosen, others)``: nested dicts that hold each leaf exactly once.

    Example:
        >>> divide({"stem": {"w": 1}, "head": {"w": 2}}, ["head/w"])
        ({'head': {'w': 2}}, {'stem': {'w': 1}})
    """
    parts: tuple[dict[_Keys, Any], dict[_Keys, Any]] = {}, {}
    for keys, leaf in _leaves(tree).items():
        parts["/".join(keys) not in paths][keys] = leaf
    return _nested(parts[0]), _nested(parts[1])


def combine(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Merge trees with disjoint leaves; inverse of :func:`partition`.

    Raises:
        ValueError: a leaf is in more than one tree, or lies on the path of another.

    Example:
        >>> combine({"head": {"w": 2}}, {"stem": {"w": 1}})
        {'head': {'w': 2}, 'stem': {'w': 1}}
    """
    leaves: dict[_Keys, Any] = {}
    for tree in trees:
        for keys, leaf in _leaves(tree).items():
            if keys in leaves:
                raise ValueError(
                    f"parameter {'/'.join(keys)!r} is both trained and held; "
                    "split the tree with tree.partition"
                )
            leaves[keys] = leaf
    return _nested(leaves)


def held_modules(
    trained: Mapping[str, Any], held: Mapping[str, Any]
) -> tuple[str, ...]:
    """Name the topmost modules of which nothing is trained.

    These run in evaluation mode: see ``held`` of :class:`~jaxtransfer.typing.Model`.

    Args:
        trained: what :func:`partition` returned first.
        held: what it returned second; an empty dict in it is a held module that has
            no parameters.

    Returns:
        Paths of modules, sorted; ``("",)`` if nothing is trained at all.

    Example:
        >>> held_modules({"head": {"w": 2}}, {"body": {"a": {"w": 1}, "b": {"w": 1}}})
        ('body',)
    """
    alive = {""} if flatten(trained) else set()
    for path in flatten(trained):
        parents = path.split("/")[:-1]
        alive |= {"/".join(parents[:depth]) for depth in range(1, len(parents) + 1)}
    topmost = set()
    for parents in _modules(held):
        for depth in range(len(parents) + 1):
            module = "/".join(parents[:depth])
            if module not in alive:
                topmost.add(module)
                break
    return tuple(sorted(topmost))


def _modules(
    node: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterable[tuple[str, ...]]:
    """Paths of the dicts that hold leaves, and of the empty ones."""
    below = [name for name in node if isinstance(node[name], Mapping)]
    if len(below) < len(node) or (path and not node):
        yield path
    for name in below:
        yield from _modules(node[name], (*path, name))


def size(tree: Any) -> int:
    """Count the numbers in a tree.

    Example:
        >>> import numpy as np
        >>> size({"w": np.zeros((2, 3)), "b": np.zeros(3)})
        9
    """
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def report(trained: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    """Print-ready table of what is trained and what is held.

    Args:
        trained: what :func:`partition` returned first.
        held: what it returned second.

    Returns:
        A line a leaf (path, shape, numbers, trained or held) and a line of sums.

    Example:
        >>> import numpy as np
        >>> print(report({"head": {"w": np.zeros(2)}}, {"stem": {"w": np.zeros(6)}}))
        path    shape  numbers
        head/w  (2,)         2  trained
        stem/w  (6,)         6  held
        trained 2 of 8 numbers (25.00 %)
    """
    rows = [
        (path, str(tuple(np.shape(leaf))), f"{size(leaf):,}", role)
        for role, part in (("trained", trained), ("held", held))
        for path, leaf in flatten(part).items()
    ]
    rows = [("path", "shape", "numbers", ""), *sorted(rows)]
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{path:<{wide[0]}}  {shape:<{wide[1]}}  {numbers:>{wide[2]}}  {role}".rstrip()
        for path, shape, numbers, role in rows
    ]
    some, every = size(trained), size(trained) + size(held)
    share = 100 * some / max(every, 1)
    return "\n".join([*lines, f"trained {some:,} of {every:,} numbers ({share:.2f} %)"])


def fingerprint(tree: Any) -> str:
    """Hash the paths, shapes, types and values of a tree.

    Args:
        tree: any pytree of arrays.

    Returns:
        64 hexadecimal digits (SHA-256); equal trees have equal fingerprints.

    Example:
        >>> import numpy as np
        >>> one, other = {"w": np.zeros(2)}, {"w": np.ones(2)}
        >>> fingerprint(one) == fingerprint(one), fingerprint(one) == fingerprint(other)
        (True, False)
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(
            f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode()
        )
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def map_with_path(
    function: Callable[[str, Any], Any], tree: Mapping[str, Any]
) -> dict[str, Any]:
    """Apply ``function(path, leaf)`` to every leaf of a nested dict.

    Example:
        >>> map_with_path(lambda path, leaf: f"{path}={leaf}", {"head": {"w": 1}})
        {'head': {'w': 'head/w=1'}}
    """
    return _nested(
        {keys: function("/".join(keys), leaf) for keys, leaf in _leaves(tree).items()}
    )


__all__ = [
    "Rules",
    "combine",
    "divide",
    "fingerprint",
    "flatten",
    "held_modules",
    "map_with_path",
    "match",
    "nearest",
    "partition",
    "report",
    "size",
    "unflatten",
]

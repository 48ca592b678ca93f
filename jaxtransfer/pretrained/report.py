"""What became of every leaf of a network and of every entry of a file."""

import dataclasses
from collections.abc import Iterable, Mapping

from jaxtransfer import tree

_MOST = 12  # lines a section of an error


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`~jaxtransfer.pretrained.load` found; printable.

    Attributes:
        file: the path of the file.
        matched: paths of the leaves that the file gave, with their names there.
        adapted: paths of those whose values a rule of ``adapt`` changed.
        fresh: paths of the leaves that keep their initial values by a rule.
        unused: names in the file that a rule passes over, or that belong to fresh
            leaves.
        missing: paths of leaves that are not in the file, with the names looked for.
        unexpected: names in the file that no leaf of the network is looked for under.
        mismatched: paths of leaves of another shape: (in the file, in the network).
    """

    file: str
    matched: Mapping[str, tuple[str, ...]]
    adapted: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    missing: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = (
        dataclasses.field(default_factory=dict)
    )

    @property
    def fits(self) -> bool:
        """Whether nothing is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        """A line of counts, then what is not simply matched."""
        counts = {
            "matched": len(self.matched),
            "adapted": len(self.adapted),
            "fresh": len(self.fresh),
            "unused": len(self.unused),
            "missing": len(self.missing),
            "unexpected": len(self.unexpected),
            "wrong shape": len(self.mismatched),
        }
        lines = [", ".join(f"{kind} {count}" for kind, count in counts.items())]
        for kind in ("adapted", "fresh", "unused"):
            lines += _listed(kind, map(repr, getattr(self, kind)))
        lines += _listed(
            "missing",
            (
                f"{path!r}: looked for {' and '.join(map(repr, names))}"
                + self._near(names)
                for path, names in self.missing.items()
            ),
        )
        lines += _listed("unexpected", map(repr, self.unexpected))
        lines += _listed(
            "wrong shape",
            (
                f"{path!r}: {there} in the file, {here} in the network"
                for path, (there, here) in self.mismatched.items()
            ),
        )
        return "\n".join(lines)

    def _near(self, names: tuple[str, ...]) -> str:
        if not self.unexpected:
            return ""
        return f" (nearest: {tree.nearest(names[0], self.unexpected, most=1)})"

    def require_fit(self) -> None:
        """Raise a ``ValueError`` that says what doesn't fit and what to do."""
        if self.fits:
            return
        remedies = []
        if not self.matched:
            remedies.append(
                "nothing matches: names= says how the file names things, e.g. "
                "names=pretrained.torch()"
            )
        if self.missing:
            remedies.append("fresh=[rules of paths] keeps initial values")
        if self.unexpected:
            remedies.append("unused=[rules of names] passes over entries of the file")
        if self.mismatched:
            remedies.append(
                "fresh=[rules of paths] keeps initial values and adapt={rule: function}"
                " makes values of another shape, e.g. pretrained.input_channels"
            )
        raise ValueError(
            f"the weights in {self.file!r} don't fit the network: {self}\n"
            f"Remedies: {'; '.join(remedies)}."
        )


def _listed(title: str, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    more = [f"  … and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return [f"{title}:", *(f"  {line}" for line in lines[:_MOST]), *more][
        : None if lines else 0
    ]


__all__ = ["Report"]

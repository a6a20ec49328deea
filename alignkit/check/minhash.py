"""Which texts are nearly the same as one of a given set: MinHash and banding (Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, ch. 3), then the exact Jaccard similarity of the candidates.

Shingles that many texts of the set share belong to a template and do not count. Only the given set is kept in memory. The texts compared with it may be any number, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

WIDTH = 12  # bytes of a shingle: about two words, four characters of Chinese
THRESHOLD = 0.8  # Jaccard similarity from which two texts count as nearly the same
BANDS, ROWS = 16, 6  # a pair at similarity s is a candidate with probability 1 - (1 - s^6)^16: 0.992 at 0.8
CROWD = 64  # texts of one bucket that are compared: the others in it are near-duplicates of these
# A shingle of more than COMMON of the texts, and of more than FEW, belongs to a template and is not compared: else
# prompts that share a long instruction would all be nearly the same.
COMMON, FEW = 0.05, 10

Hashes = NDArray[np.uint32]
Starts = NDArray[np.int64]

_draw = np.random.default_rng(0x5EED)
_BYTE = _draw.integers(1 << 32, size=256, dtype=np.uint32)  # a random word for each value of a byte
_A = _draw.integers(1 << 31, size=BANDS * ROWS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_B = _draw.integers(1 << 32, size=BANDS * ROWS, dtype=np.uint32)
_FOLD = _draw.integers(1 << 63, size=ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def normal(text: str) -> str:
    """The text as it is compared: lower case, runs of white space as one blank."""
    return " ".join(text.lower().split())


def shingles(texts: Sequence[str]) -> tuple[Hashes, Starts]:
    """Hashes of every `WIDTH` bytes of each text, one text after the other, and where each text's begin.

    A shorter text is padded, so that it has one shingle. Texts are taken as they are: see `normal`.

    Returns:
        hashes [N] u32 and starts [len(texts) + 1] i64: those of text i are hashes[starts[i]:starts[i + 1]].
    """
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    sizes = np.fromiter((max(len(text), WIDTH) for text in encoded), np.int64, len(encoded))
    data = np.frombuffer(b"".join(text.ljust(WIDTH, b"\0") for text in encoded), np.uint8)
    words = _BYTE[data]
    rolled = np.zeros(max(len(words) - WIDTH + 1, 0), np.uint32)
    for place in range(WIDTH):  # h = 31 h + word: the same bytes have the same hash wherever they stand
        rolled *= np.uint32(31)
        rolled += words[place : place + len(rolled)]
    ends = np.cumsum(sizes)
    inside = np.ones(len(rolled), bool)
    for end in range(1, WIDTH):  # windows over the border of two texts
        inside[ends[:-1] - end] = False
    starts = np.concatenate([[0], np.cumsum(sizes - WIDTH + 1)])
    return _mixed(rolled[inside]), starts


def _mixed(h: Hashes) -> Hashes:
    """A bijection of 32-bit words that spreads every bit over all (the finaliser of MurmurHash3)."""
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


def band_keys(hashes: Hashes, starts: Starts) -> NDArray[np.uint64]:
    """[BANDS, texts] u64: texts that agree in the minimum of all hash functions of a band have the same key there.

    The key of a text without shingles means nothing.
    """
    filled = np.flatnonzero(np.diff(starts))
    keys, lowest = np.zeros((BANDS, len(starts) - 1), np.uint64), np.zeros(len(filled), np.uint32)
    for band in range(BANDS if len(filled) else 0):
        folded = np.zeros(len(filled), np.uint64)
        for row in range(ROWS):
            number = band * ROWS + row
            np.minimum.reduceat(hashes * _A[number] + _B[number], starts[filled], out=lowest)
            folded = (folded ^ lowest) * _FOLD[row]
            folded ^= folded >> np.uint64(29)
        keys[band, filled] = folded
    return keys


@dataclass
class _Built:
    """What queries need, made of all added texts once."""

    common: Hashes  # of shingles that are not compared, sorted
    hashes: Hashes  # of every text, distinct and sorted, without the common ones
    starts: Starts
    keys: NDArray[np.uint64]  # [BANDS, texts], in order
    owners: NDArray[np.int64]  # [BANDS, texts], whose they are


@dataclass
class NearIndex:
    """The set of texts that others are compared with. `add` all of them first, then ask `near`."""

    _added: list[Hashes] = field(default_factory=list)  # of each text, distinct and sorted
    _built: _Built | None = None

    def add(self, texts: Sequence[str]) -> None:
        """Texts, as `normal` gives them, with the numbers that follow on those added before."""
        if texts:
            hashes, starts = shingles(texts)
            self._added += [np.unique(part) for part in np.split(hashes, starts[1:-1])]
            self._built = None

    def near(self, texts: Sequence[str]) -> list[tuple[int, int, float]]:
        """(number in `texts`, number of the most similar text of the index, Jaccard similarity >= THRESHOLD)."""
        if not texts or not self._added:
            return []
        built = self._built = self._built or self._build()
        hashes, starts = _without(built.common, *shingles(texts))
        filled = np.flatnonzero(np.diff(starts))  # nothing is left of a text that is all template
        candidates: set[tuple[int, int]] = set()
        for band, wanted in enumerate(band_keys(hashes, starts)):
            low = np.searchsorted(built.keys[band], wanted, "left")
            high = np.searchsorted(built.keys[band], wanted, "right")
            for text in filled[high[filled] > low[filled]]:
                found = built.owners[band, low[text] : min(high[text], low[text] + CROWD)]
                candidates.update((int(text), int(owner)) for owner in found)
        best: dict[int, tuple[float, int]] = {}
        mine = (-1, hashes)
        for text, owner in sorted(candidates):
            if text != mine[0]:
                mine = (text, np.unique(hashes[starts[text] : starts[text + 1]]))
            similarity = jaccard(mine[1], built.hashes[built.starts[owner] : built.starts[owner + 1]])
            if similarity >= THRESHOLD and similarity > best.get(text, (0.0, 0))[0]:
                best[text] = (similarity, owner)
        return [(text, owner, similarity) for text, (similarity, owner) in sorted(best.items())]

    def _build(self) -> _Built:
        whole = np.concatenate(self._added)
        values, counts = np.unique(whole, return_counts=True)
        common = values[counts > max(FEW, COMMON * len(self._added))]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in self._added])])
        hashes, starts = _without(common, whole, starts)
        keys = band_keys(hashes, starts)
        order = np.argsort(keys, axis=1, kind="stable")
        return _Built(common, hashes, starts, np.take_along_axis(keys, order, axis=1), order)


def _without(common: Hashes, hashes: Hashes, starts: Starts) -> tuple[Hashes, Starts]:
    """The hashes of each text but for those of `common`, which is sorted, and where each text's begin then."""
    if not len(common):
        return hashes, starts
    kept = common[np.searchsorted(common, hashes).clip(max=len(common) - 1)] != hashes
    return hashes[kept], np.concatenate([[0], np.cumsum(kept)])[starts]


def jaccard(one: Hashes, other: Hashes) -> float:
    """|A and B| / |A or B| of two sorted arrays of distinct values."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)

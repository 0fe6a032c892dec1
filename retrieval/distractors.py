"""Larger glossaries for the same clips: which wrong terms are added, in which order.

The order of a draw follows from each term's own hash, so it is the same on every machine, does not depend on the order
of the file, and the first n terms of a larger draw are the draw of n: one pass over the terms measures all sizes.
"""

from collections.abc import Collection, Iterable, Sequence

from data.glossary import Glossary
from data.terms import key64


def in_draw_order(terms: Iterable[str], seed: int = 0) -> list[str]:
    """The distinct terms in an order that looks random and depends on nothing but the terms and the seed."""
    return sorted(set(terms), key=lambda term: (key64(f"{seed}\n{term}"), term))


def gold_first(terms: Iterable[str], gold: Collection[str], seed: int = 0) -> list[str]:
    """The glossary with all terms that are right for any clip in front, so that each of its larger parts is fair."""
    wanted = set(gold)
    ordered = in_draw_order(terms, seed)
    return [term for term in ordered if term in wanted] + [term for term in ordered if term not in wanted]


def part_sizes(num_gold: int, num_terms: int) -> list[int]:
    """Ascending sizes at which a glossary of `num_terms` is measured: powers of ten that hold all right terms, and all.

    Example: 53 right terms in a glossary of 20,000 -> [100, 1000, 10000, 20000].
    """
    powers = [10**n for n in range(2, 10)]
    return [n for n in powers if num_gold <= n < num_terms] + [num_terms]


def draw_distractors(
    candidates: Glossary, glossary_terms: Collection[str], gold_groups: Collection[int], num: int, seed: int = 0
) -> list[str]:
    """`num` terms that are wrong for every clip, in draw order.

    Left out: terms of the glossary itself, and variants (case, plural, punctuation, alias) of a right term, which would
    be right as well.

    Args:
        gold_groups: variant groups (`data.terms.variant_group`, aliases included) of the terms right for any clip.

    Raises:
        ValueError: the candidates hold fewer than `num` such terms.
    """
    taken, groups = set(glossary_terms), set(gold_groups)
    drawn: list[str] = []
    for term in in_draw_order(candidates.terms, seed):
        if len(drawn) == num:
            break
        if term not in taken and candidates.group(term) not in groups:
            drawn.append(term)
    if len(drawn) < num:
        raise ValueError(
            f"distractor_sizes: got {num}, but {candidates.path} holds {len(drawn)} of {len(candidates.entries)} terms "
            "that are neither in the glossary nor a variant of a right term; give a larger file or lower sizes"
        )
    return drawn


def check_sizes(sizes: Sequence[int]) -> list[int]:
    """Numbers of distractors, ascending and distinct. ValueError for one below 1."""
    if any(size < 1 for size in sizes):
        raise ValueError(f"distractor_sizes: got {list(sizes)}; allowed: numbers of 1 and above")
    return sorted(set(sizes))

"""The short report of a preference training: preferences.html in its run."""

from collections.abc import Sequence
from typing import Any

from counsel.report import answer_columns, page, section
from train.preferences.recipe import PreferenceRecipe


def preference_finding(results: dict[str, Any]) -> str:
    """What the held-out pairs say, in one sentence."""
    held_out = results["held_out"]
    learned = (
        "The preferences were learned"
        if held_out["low"] > 0.5
        else "The opposite of the preferences was learned"
        if held_out["high"] < 0.5
        else "It is not shown that anything was learned"
    )
    return (
        f"{learned}: of {held_out['n']} held-out pairs, {held_out['accuracy']:.0%} are told apart as people did "
        f"(95 % interval {held_out['low']:.0%} to {held_out['high']:.0%}; chance is 50 %)."
    )


def preference_cells(results: dict[str, Any]) -> list[list[str]]:
    """The results as a table: measure, before, after, and the change with its interval."""
    held_out, people, length = results["held_out"], results["people_bits_per_byte"], results["length"]
    cells = [["measure", "n", "before", "after", "change"]]
    cells.append(["held-out pairs told apart", str(held_out["n"]), "-",
                  f"{held_out['accuracy']:.3f} ({held_out['low']:.3f} to {held_out['high']:.3f})", "-"])  # fmt: skip
    if people:
        between = "" if people["low"] is None else f" ({people['low']:+.4f} to {people['high']:+.4f})"
        cells.append(["bits per byte of people's answers", str(people["rows"]), f"{people['before']:.4f}",
                      f"{people['after']:.4f}", f"{people['lost']:+.4f}{between}"])  # fmt: skip
    if length:
        change = length["words_after"] - length["words_before"]
        cells.append(["words per answer", str(length["prompts"]), f"{length['words_before']:.1f}",
                      f"{length['words_after']:.1f}", f"{change:+.1f}"])  # fmt: skip
    return cells


def preference_page(recipe: PreferenceRecipe, results: dict[str, Any], samples: Sequence[dict[str, str]]) -> str:
    """The report as one HTML file."""
    notes = "Bits per byte: lower is better, so a plus is a loss. Before: the adapter that training continued from."
    if results["length"]:
        notes += f" Answers are greedy, of at most {results['length']['max_tokens']} tokens."
    sections = [section("Before and after", preference_cells(results), note=notes)]
    if samples:
        examples = [(one["question"], [("before", one["before"]), ("after", one["after"])]) for one in samples]
        sections.append(answer_columns("Answers to held-out prompts", examples))
    warnings = [] if results["people_bits_per_byte"] else [
        "The rows that the initial adapter was trained with are not here, so what people's answers lost is unknown."
    ]  # fmt: skip
    title = f"Preferences: {recipe.name}, from {recipe.init_adapter}"
    return page(title, sections, finding=preference_finding(results), warnings=warnings)

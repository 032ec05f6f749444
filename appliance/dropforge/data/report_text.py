"""The report for people: in a terminal (with colours or without), and as a card for the result folder."""

from __future__ import annotations

from collections.abc import Sequence

from dropforge.data.report import DataReport

WIDTH = 40
_LEARNT, _OFF = "\x1b[30;42m", "\x1b[0m"


def report_text(report: DataReport, *, tokenizer: str, colour: bool = False) -> str:
    """The whole report. `tokenizer` says in words which tokenizer counted; what is learnt is green, or in [[ ]]."""
    lines = [_summary(report), "", "FILES"]
    for file in report.files:
        lines.append(f"  {file.path}: {_count(file.rows, 'row')}, {_size(file.bytes)}, format {file.format}")
        lines.append(f"    because {file.format_reason}")
    lines += ["", "ROWS", *_indent(_rows(report))]
    lines += ["", "LENGTHS of rows in tokens (about four letters of English each)", f"  counted with {tokenizer}"]
    lines += _indent(_lengths(report))
    lines += ["", "PACKING: several rows side by side in a longer one, so that less is padding"]
    lines += _indent(_packing(report))
    if report.examples:
        lines += ["", "EXAMPLES as the model sees them; " + ("green is learnt" if colour else "[[ ]] is learnt")]
        for number, pieces in enumerate(report.examples, start=1):
            lines += [f"  --- {number}", *_indent(_example(pieces, colour=colour).split("\n"))]
    lines += ["", "WARNINGS", *_indent(list(report.warnings) or ["none"])]
    return "\n".join(lines)


def data_card(report: DataReport, *, tokenizer: str) -> str:
    """The same as Markdown, without colours, for DATA_CARD.md."""
    text = report_text(report, tokenizer=tokenizer)
    return f"# Data card\n\nWhat this model learnt from, as it was understood and masked.\n\n```text\n{text}\n```\n"


def _summary(report: DataReport) -> str:
    """What a reader in a hurry takes away."""
    dropped = f", {report.rows_dropped:,} of {report.rows_read:,} dropped" if report.rows_dropped else ""
    warned = len(report.warnings)
    noted = f"{_count(warned, 'warning')} at the end" if warned else "no warnings"
    return f"{_count(report.rows, 'row')} to train on{dropped}; {noted}."


def _rows(report: DataReport) -> list[str]:
    lines = [f"read        {report.rows_read:,}"]
    lines += [f"dropped     {count:,}: {why}" for why, count in report.dropped_reasons.items()]
    lines += [f"            for example {where}" for where, _ in report.dropped[:3]]
    if report.duplicates:
        lines.append(f"repeated    {report.duplicates:,} dropped")
    if report.contaminated_rows:
        lines.append(f"in both     {report.contaminated_rows:,} training rows are evaluation rows too")
    lines.append(f"training    {report.rows:,} per epoch, {report.tokens:,} tokens, {_share(report)} of them learnt")
    aside = "" if report.eval_rows else " (data.eval: {fraction: 0.05} would keep some aside to measure with)"
    lines.append(f"evaluation  {report.eval_rows:,}{aside}")
    if len(report.sources) > 1:
        lines.append("mix:")
        for path, weight, before, after in report.sources:
            share = 100 * after / max(1, report.rows)
            lines.append(f"  {path}: {before:,} rows, weight {weight:g}: {after:,} rows, {share:.1f} % of the training")
    if report.roles:
        lines.append("turns       " + ", ".join(f"{role} {count:,}" for role, count in report.roles.items()))
    if report.languages:
        found = ", ".join(f"{name} {100 * share:.0f} %" for name, share in report.languages.items())
        unknown = "; ?: too short to tell" if "?" in report.languages else ""
        lines.append(f"languages   {found} (guessed{unknown})")
    if report.system:
        lines.append(f"system text {report.system[:200]!r} in every conversation")
    return lines


def _share(report: DataReport) -> str:
    return f"{100 * report.trained_tokens / max(1, report.tokens):.1f} %"


def _lengths(report: DataReport) -> list[str]:
    top = max((count for _, _, count in report.histogram), default=1)
    width = max((len(f"{high:,}") for _, high, _ in report.histogram), default=1)
    lines = []
    for low, high, count in report.histogram:
        bar = "#" * (max(1, round(WIDTH * count / top)) if count else 0)
        span = f"{low:>{width},} to {high:>{width},}" if low < high else f"{low:>{width},}    {'':>{width}}"
        lines.append(f"{span}  {bar:<{WIDTH}}  {count:,}")
    lines.append(f"mean {report.mean_length:.0f}, longest {report.longest:,} (after cutting)")
    if report.truncated:
        lines.append(f"cut to the maximum length: {report.truncated:,} rows")
    lines.append(f"suggested model.max_seq_length: {report.suggested_length:,} (holds 99 % of the rows whole)")
    return lines


def _packing(report: DataReport) -> list[str]:
    return [
        f"at {entry.budget:>6,} tokens: {100 * entry.efficiency:5.1f} % full in {_count(entry.rows, 'packed row')} "
        f"(unpacked: {100 * entry.alone:.1f} %)"
        for entry in report.packing
    ] or ["nothing to pack"]


def _example(pieces: Sequence[tuple[str, bool]], *, colour: bool) -> str:
    start, end = (_LEARNT, _OFF) if colour else ("[[", "]]")
    return "".join(f"{start}{text}{end}" if learnt else text for text, learnt in pieces)


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _size(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"

"""The report on a data set: what happened to each of its rows, and how it was split."""

from dataclasses import dataclass

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Report:
    """What happened to every row, in counts. Lengths are in words.

    dropped: rows by reason. Each row counts once, under the first reason that applies.
    masked: rows in which a link, an e-mail address or a phone number was masked, by kind.
    examples: the first rows dropped for each reason, as `row 7: '...'`. Never written to disk: they contain contacts.
    read_as: the detected format (encoding, separator, compression), the shape of the conversations, and columns that
    were matched by a similar name.
    split: the unit: `question`, `conversation` or `row`.
    conversations: rows out that have several exchanges or a system message of their own.
    changed: turns of the rows out that were dropped, merged or cut, by kind.
    leak: questions in more than one split; 0 unless `split` is `row`.
    row_split_leak: the share of test questions that a random row split of the same rows would put in training too.
    shared: conversations that share a user turn of 8 words or more with another row: `exact`, or else a near copy of
    one: `near`.
    overlap: held-out rows that share such a turn with a training row: `exact`, else `near`.
    exchanges: user turns with a reply, per row. answer_words: of every reply.
    """

    source: str
    revision: str
    source_sha256: str
    read_as: str
    split: str
    split_seed: int
    rows_in: int
    rows_out: int
    conversations: int
    dropped: dict[str, int]
    masked: dict[str, int]
    changed: dict[str, int]
    examples: dict[str, list[str]]
    questions: dict[str, int]
    rows: dict[str, int]
    leak: int
    row_split_leak: float
    shared: dict[str, int]
    overlap: dict[str, int]
    answers_per_question: dict[str, float]
    exchanges: dict[str, float]
    question_words: dict[str, float]
    answer_words: dict[str, float]

    def __str__(self) -> str:
        commit = f" at {self.revision[:12]}" if self.revision else ""
        lines = [f"data         {self.source}{commit} (sha256 {self.source_sha256[:12]})"]
        lines += [f"read as      {self.read_as}"]
        lines += [f"rows in      {self.rows_in:>7,}"]
        lines += [f"  dropped    {n:>7,}  {reason}" for reason, n in self.dropped.items()]
        lines += [f"  masked     {n:>7,}  {kind}" for kind, n in self.masked.items()]
        what = "conversations with" if self.conversations else "answers to"
        lines += [f"rows out     {self.rows_out:>7,}  {what} {sum(self.questions.values()):,} questions"]
        lines += [f"  changed    {n:>7,}  {kind}" for kind, n in self.changed.items()]
        lines += [f"  {name:<10} {self.rows[name]:>7,}  {self.questions[name]:,} questions" for name in SPLITS]
        if self.conversations:
            stats = self.exchanges
            lines += [f"exchanges    per row: median {stats['median']:g}, p95 {stats['p95']:g}, max {stats['max']:g}"]
        for label, stats in (("questions", self.question_words), ("answers", self.answer_words)):
            lines += [f"words        {label}: median {stats['median']:g}, p95 {stats['p95']:g}, max {stats['max']:g}"]
        per = self.answers_per_question
        lines += [f"answers      per question: mean {per['mean']:.1f}, max {per['max']:g}"]
        lines += [f"leak         {self.leak:>7,}  questions in more than one split"]
        would = "put" if self.split == "row" else "would put"
        lines += [f"{'':>22}a random row split {would} {self.row_split_leak:.0%} of test questions in training too"]
        if self.conversations:
            exact, near = self.shared["exact"], self.shared["near"]
            kept = "" if self.split == "row" else "; kept on one side"
            lines += [f"shared       {exact:>7,}  conversations share a user turn, {near:,} more a near copy{kept}"]
        exact, near = self.overlap["exact"], self.overlap["near"]
        lines += [f"overlap      {exact:>7,}  held-out rows share a user turn with training, {near:,} more a near copy"]
        return "\n".join(lines)

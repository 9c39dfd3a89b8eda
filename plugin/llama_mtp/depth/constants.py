"""The depth policy's constants, in one table. README.md beside it says what each is worth."""

from __future__ import annotations

# ---- costs
MEMORY = 15  # times of which a cost is the median
NEWS = 2  # first times of a row count, after which the rule is made anew at once
STALE = 768  # rounds, for each row count, in which one that nobody tests looks half as dear
KEEP_WASTE = 0.98  # what is kept of the time that drafting wasted, per round that drafts

# ---- acceptance
KEEP = 0.98  # what is kept of the verdicts on a class, per verdict
PRIOR = 2.0  # verdicts that the first guess counts as
HOPE = 0.75  # that guess, where a pick has no confidence
REST = 4.0  # verdicts that the text before counts as
WORSE = 0.3  # of its chance that a pick is right: the turn that is watched for
ALARM = 7.0  # logarithm of how much likelier the turn must be

# ---- policy
REPLAN = 8  # rounds that a rule serves
LOOKS = 3  # rounds of a look
LOOK_WINDOW = 32  # rows of the text that a look reads, after the first one
LOOK_SHARE = 0.005  # share of the time that looks may take
TEXT = 64  # tokens after which the next generation counts as a new text
LEAST_REST, LONGEST_REST = 16, 256  # tokens
PLAIN_ROUNDS = 3  # that time plain decoding anew ...
FIRST_CHECK, LAST_CHECK = 32, 512  # ... after so many rounds without, doubled each time

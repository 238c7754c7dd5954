"""Who is better, and how sure: pure statistics on arrays of scores, [configuration, seed].

`statistics` holds the four tools (interval, probability, test, correction), `ranking` the protocol that uses
them, `sentences` the words in which a ranking answers.
"""

from fallline.evidence.ranking import Candidate, Entry, Ranking, rank
from fallline.evidence.statistics import bootstrap_interval, holm, probability_better, sign_flip_test

__all__ = [
    "Candidate",
    "Entry",
    "Ranking",
    "bootstrap_interval",
    "holm",
    "probability_better",
    "rank",
    "sign_flip_test",
]

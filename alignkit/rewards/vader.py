"""Sentiment of the response by VADER's rules (Hutto and Gilbert 2014): a published scorer that serves as gold."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.core.errors import InputError
from alignkit.rewards.base import Context, Scorer, text_scorer


@dataclass
class Vader:
    """VADER's compound sentiment of the response, -1 (negative) to 1 (positive)."""

    name: str = "vader"
    weight: float = 1.0  # in the sum of rewards

    def start(self, context: Context) -> Scorer:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise InputError("reward=vader needs the package vaderSentiment: pip install 'alignkit[demo]'") from None
        analyzer = SentimentIntensityAnalyzer()
        return text_scorer(
            context,
            lambda prompts, responses, meta: [analyzer.polarity_scores(r)["compound"] for r in responses],
            self.name,
        )

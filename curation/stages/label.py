"""Label (Waver §3.4): the action that a caption tells of, at three levels of the taxonomy in `waver_core/taxonomy`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa

from curation import stage
from curation.stage import BackendUse, Row
from waver_core.backends.contracts import ActionLabeler
from waver_core.config import Strict
from waver_core.manifest import Column
from waver_core.taxonomy import Taxonomy, load_taxonomy


class Options(Strict):
    """Which labeler."""

    backend: str = "lexical"
    backend_options: dict[str, Any] = {}


class Stage(stage.Stage):
    """Reads captions, writes labels; "none" where a caption names no action of the taxonomy."""

    name = "label"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("text",)
    reads = ("caption",)
    columns = (
        Column("label_1", pa.string(), "first level of the action, one of 12 or none"),
        Column("label_2", pa.string(), "second level of the action, one of 100 or none"),
        Column("label_3", pa.string(), "third level of the action, one of more than 6,000 or none"),
    )

    def backends(self) -> list[BackendUse]:
        """The labeler."""
        return [BackendUse("action_labeler", self.options.backend, self.options.backend_options)]

    @cached_property
    def _labeler(self) -> ActionLabeler:
        labeler: ActionLabeler = self.backends()[0].create()
        return labeler

    @property
    def taxonomy(self) -> Taxonomy:
        """The taxonomy that the labels are of."""
        return getattr(self._labeler, "taxonomy", None) or load_taxonomy()

    @property
    def language_model(self) -> Any:
        """The labeler."""
        return self._labeler

    def annotate(self, rows: Sequence[Row]) -> list[Row | Exception]:
        """Labels of every row's caption."""
        found = self._labeler.label([row["caption"] for row in rows])
        return [
            label if isinstance(label, Exception) else dict(zip(("label_1", "label_2", "label_3"), label, strict=True))
            for label in found
        ]

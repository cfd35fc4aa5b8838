"""A service that a model server stands behind, if one is given: its state, its model, its answers.

Uses answers, errors, log, service and text, and models once there is a URL; used by services.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from karna.errors import Unavailable
from karna.log import log
from karna.service import Service
from karna.text import one_line

if TYPE_CHECKING:
    from karna.answers import Answer
    from karna.models import ModelServer, Report

MAX_LISTED_MODELS = 5  # in a detail


class ModelService(Service):
    """A service with an embedded default and, when a URL is given, a model server."""

    kind: ClassVar[str]
    embedded: ClassVar[str]  # the detail without a model server

    def __init__(
        self,
        *,
        url: str | None = None,
        model: str | None = None,
        key: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(self.kind)
        self._configured = self._model = model or None
        self._note = ""  # what is odd about the model
        self.server: ModelServer | None = None
        if url:
            self.use_server(url, model=model, key=key, timeout_s=timeout_s)

    def use_server(
        self,
        url: str,
        *,
        model: str | None = None,
        key: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Use the model server at `url`; before the service starts. Raises ValueError."""
        from karna.models import MODEL_SILENCE_S, ModelServer  # with http.client

        variables = (f"KARNA_{self.kind.upper()}_KEY", "OPENAI_API_KEY")
        key = key or next(filter(None, map(os.environ.get, variables)), None)
        self._configured = self._model = model or None
        key, timeout_s = key and key.strip(), timeout_s or MODEL_SILENCE_S
        self.server = ModelServer(url, key=key, timeout_s=timeout_s)

    async def start(self) -> None:
        if self.server is None:
            self.set_state("running", self.embedded)

    async def stop(self) -> None:
        if self.server is not None:
            self.server.close()

    async def check(self) -> None:
        """Ask the model server for its models; raises Unavailable and is degraded without."""
        if self.server is not None:
            await self._find_model(self.server)

    async def _find_model(self, server: ModelServer) -> str:
        """The configured model, or else the first of the server's, is used from then."""
        with self._showing(server):
            names = await server.list_models()
            if not (self._configured or names):
                raise Unavailable(f"model server {server.host}: lists no model")
            self._model = self._configured or names[0]
            self._set_note(self._model, names)
            return self._model

    def _set_note(self, model: str, names: list[str]) -> None:
        """A model that is not listed may be there nevertheless, under another name."""
        note = ""
        if model not in names and f"{model}:latest" not in names:  # as Ollama calls it
            there = ", ".join(names[:MAX_LISTED_MODELS]) or "none"
            note = " " + one_line(f"is not listed; there are {there}")
        if note and note != self._note:
            log.warning("service %s: model %s%s", self.name, one_line(model, 100), note)
        self._note = note

    async def chat(
        self, server: ModelServer, messages: list[Any], report: Report | None = None, **more: Any
    ) -> tuple[Answer, str]:
        """Let the model answer: its answer, its name; the state follows how it went."""
        model = self._model or await self._find_model(server)
        with self._showing(server):
            answer = await server.chat(model, messages, report, **more)
            self._model = self._model or model  # another request may have met the server away
            return answer, model

    @contextlib.contextmanager
    def _showing(self, server: ModelServer) -> Iterator[None]:
        """Set the state that an exchange with the server shows."""
        try:
            yield
        except Unavailable as error:
            self._model = self._configured  # it may come back with another
            self.set_state("degraded", str(error))
            raise
        shown = f"model {one_line(self._model or '', 100)} at {server.host}"
        self.set_state("running", shown + self._note)

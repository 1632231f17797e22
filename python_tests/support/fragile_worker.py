"""A worker that explains nothing and dies when a row says so: what a crew does about it is tested without a model."""

import os
import signal
from pathlib import Path
from typing import Any

import atman_kernels
from atman_kernels.errors import InputError

FACTS = {"versions": {"atman_kernels": atman_kernels.__version__}, "dtype": "float32"}


class FragileWorker:
    def load(self, model: str, threads: int, loading: dict[str, Any], explaining: dict[str, Any]) -> dict[str, Any]:
        if model == "nowhere":
            raise InputError("model 'nowhere' is not there")
        if model == "differs":
            return {**FACTS, "dtype": f"float{os.getpid()}"}
        return FACTS

    def explain(self, rows: list[Any], options: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """A prompt "die" ends the process, "die once FILE" the first process that meets it, "fail" is an error."""
        for row in rows:
            verb, _, file = row.prompt.partition(" once ")
            if verb == "die" and not (file and Path(file).exists()):
                if file:
                    Path(file).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        made = [
            {"id": row.id, "fingerprint": row.fingerprint, "prompt": row.prompt, "settings": str(os.getpid())}
            | ({"error": "InputError: fails"} if row.prompt == "fail" else {})
            for row in rows
        ]
        return made, ["a word of warning"]

"""Speculators beside a target: checked when it is loaded, read when a session first needs one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bus.protocol.errors import ModelError
from engines.torch.network import CausalNetwork
from engines.torch.speculators.base import Speculator
from engines.torch.speculators.eagle3 import Eagle3
from engines.torch.speculators.file import EAGLE3, Eagle3Config, SpeculatorFile
from engines.torch.speculators.medusa import Medusa


class Speculators:
    """Those of one target.

    Attributes:
        kinds: that there are, in order of the directories.
    """

    def __init__(
        self, directories: Sequence[Path], network: CausalNetwork, vocab_size: int, digest: str
    ) -> None:
        """Check the directories, at most one of a kind.

        Args:
            network: of the target. vocab_size, digest: its number of real tokens, and that of its
                tokenizer.

        Raises:
            ModelError: a directory is damaged, does not fit the target, or two are of one kind.
        """
        self._network = network
        self._files: dict[str, SpeculatorFile] = {}
        self._ready: dict[str, Speculator] = {}
        for directory in directories:
            file = SpeculatorFile.open(directory)
            self._check(file, vocab_size, digest)
            kind = file.config.kind
            if kind in self._files:
                raise ModelError(
                    f"{self._files[kind].directory} and {directory} are both of kind {kind}; give "
                    "one of each kind"
                )
            self._files[kind] = file
        self.kinds = tuple(self._files)

    def __getitem__(self, kind: str) -> Speculator:
        """The speculator of one of `kinds`.

        Raises:
            ModelError: its weights cannot be read.
        """
        if kind not in self._ready:
            self._ready[kind] = self._read(self._files[kind])
        return self._ready[kind]

    def _read(self, file: SpeculatorFile) -> Speculator:
        if file.config.kind != EAGLE3:
            return Medusa(file, self._network)
        body, _ = self._network.own
        return Eagle3(file, body.embedding, body.basis)

    def _check(self, file: SpeculatorFile, vocab_size: int, digest: str) -> None:
        given, model = file.config, self._network.own[0].config
        layers = self._network.feature_layers
        if given.tokenizer_digest != digest:
            what = "its tokenizer is another"
        elif given.vocab_size != vocab_size:
            what = f"it is for {given.vocab_size} tokens, the target has {vocab_size}"
        elif given.hidden != model.hidden_size:
            what = f"its hidden size is {given.hidden}, the target's {model.hidden_size}"
        elif isinstance(given, Eagle3Config) and given.feature_layers != layers:
            what = f"it reads layers {given.feature_layers}, and this target gives {layers}"
        else:
            return
        raise ModelError(
            f"speculator {file.directory} does not fit this target: {what}; it was trained on "
            f"{given.target}"
        )

"""Every error this project raises on purpose.

    E2SCIError
    ├── ConfigurationError          a setting, flag or file is wrong; fix it and start again
    │   ├── InsecureBindError       a socket would listen beyond loopback without keys
    │   └── ModelError              a model cannot be loaded, or the pair does not fit
    │       └── TokenizerMismatchError
    ├── LocalError                  this process broke a rule; a bug here
    │   ├── MessageTooLargeError    a message is over the frame limit and was not sent
    │   └── ImpossibleEventError    an event that cannot happen in a state machine's state
    ├── RemoteError                 a peer broke the protocol; we reply, count, and live on
    │   └── DecodeError             a frame is not a message of this protocol version
    ├── RequestError                a prompt was refused; the text is shown to its author
    │   ├── QueueFullError          the queue holds as many prompts as it may
    │   └── RequestFailedError      the request was accepted and ended with an error
    ├── OwnershipLostError          another edge owns the request now; stop writing
    ├── StoreUnavailableError       Redis does not answer
    └── RequestTimeoutError         no answer within the time the caller allowed

Messages say what happened, what was expected, and what to do.
"""

from __future__ import annotations

__all__ = [
    "ConfigurationError",
    "DecodeError",
    "E2SCIError",
    "ImpossibleEventError",
    "InsecureBindError",
    "LocalError",
    "MessageTooLargeError",
    "ModelError",
    "OwnershipLostError",
    "QueueFullError",
    "RemoteError",
    "RequestError",
    "RequestFailedError",
    "RequestTimeoutError",
    "StoreUnavailableError",
    "TokenizerMismatchError",
]


class E2SCIError(Exception):
    """Root of the tree."""


class ConfigurationError(E2SCIError):
    """A setting, flag or file is wrong."""


class InsecureBindError(ConfigurationError):
    """A socket would listen beyond loopback without CURVE keys."""


class ModelError(ConfigurationError):
    """A model cannot be loaded, or draft and target do not fit together."""


class TokenizerMismatchError(ModelError):
    """Draft and target do not share a tokenizer."""


class LocalError(E2SCIError):
    """This process broke a rule of its own."""


class MessageTooLargeError(LocalError):
    """An encoded message is over the frame limit; it was not sent."""


class ImpossibleEventError(LocalError):
    """An event that cannot happen in the state a machine is in. Tests let it through; a worker
    counts it, logs it and goes on as if the event had not been."""


class RemoteError(E2SCIError):
    """A peer broke the protocol."""


class DecodeError(RemoteError):
    """A frame is not a message of this protocol version."""


class RequestError(E2SCIError):
    """A prompt was refused; the message is meant for the person who sent it."""


class QueueFullError(RequestError):
    """The prompt queue is at its limit; nothing was trimmed and nothing was added."""


class RequestFailedError(RequestError):
    """The request was accepted and ended with an error result."""


class OwnershipLostError(E2SCIError):
    """Another edge worker has claimed the request; this one must stop writing."""


class StoreUnavailableError(E2SCIError):
    """Redis does not answer."""


class RequestTimeoutError(E2SCIError):
    """No answer within the time the caller allowed."""

"""Whether a target can serve a method."""

from __future__ import annotations

from bus.protocol.messages import Fault, FaultCode, OpenSession
from decoding import methods
from engines.torch.target import TargetModel


def incapable(model: TargetModel, message: OpenSession, method: methods.Method) -> Fault | None:
    """Why the target cannot serve the method that a session asks for, or None."""
    capabilities = model.capabilities
    missing = method.missing(capabilities)
    if message.temperature > 0 and not capabilities.full_rows:
        missing.append("full_rows")
    if missing:
        detail = (
            f"method {method.name!r} needs {' and '.join(missing)} of its target, which "
            f"{model.name} has not; choose another method or target"
        )
        return Fault(message.session, FaultCode.UNKNOWN_METHOD, detail)
    if method.speculator and method.speculator not in model.speculators:
        detail = (
            f"method {method.name!r} needs the speculator {method.speculator!r} beside its "
            f"target, and {model.name} has none here: "
            f"{methods.how_to_get(method.speculator)}, or choose another method"
        )
        return Fault(message.session, FaultCode.UNKNOWN_METHOD, detail)
    return None

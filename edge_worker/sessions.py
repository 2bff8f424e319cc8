"""Which kind of session answers a request: token by token, by a chain of stages, or in steps."""

from __future__ import annotations

from decoding.edge_state import Control, SessionSpec
from edge_worker.answer import AnswerOutput
from edge_worker.context import SessionContext
from edge_worker.session import EdgeSession
from edge_worker.specs import EdgeModel
from edge_worker.stages import drafting_of
from edge_worker.step_session import StepSession
from edge_worker.usage import UsageMeter

RequestSession = EdgeSession | StepSession


def session_of(
    context: SessionContext, output: AnswerOutput, meter: UsageMeter, model: EdgeModel,
    spec: SessionSpec, control: Control, term: int,
) -> RequestSession:  # fmt: skip
    """A session for a request, not begun yet.

    Args:
        meter: the same as the output's. term: of the claim.
    """
    if spec.method.steps is not None:
        return StepSession(context, output, meter, model)
    return EdgeSession(
        context, output, drafting_of(context, spec.method, meter.stage, control, term)
    )

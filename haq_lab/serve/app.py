"""Build the web application: transformers' OpenAI-compatible server for one model, with our pages."""

from __future__ import annotations

from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server

from haq_lab.offload.session import OffloadSession
from haq_lab.serve.disconnect import CancelOnDisconnect
from haq_lab.serve.experts import PAGE, expert_view
from haq_lab.serve.generation import OneQueue, RequestQueue
from haq_lab.serve.handlers import ChatHandler, TextHandler
from haq_lab.serve.metrics import Metrics

# Of transformers' endpoints. The others load further models, or need models of another kind.
ENDPOINTS = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}


class _OneModel(ModelManager):
    """Serves a model that is already loaded, and no other."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, queue: RequestQueue):
        self._model, self._tokenizer, self._queue = model, tokenizer, queue
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def _load_model(self, *arguments: Any, **keywords: Any) -> PreTrainedModel:
        return self._model

    def _load_processor(self, *arguments: Any, **keywords: Any) -> Any:
        return self._tokenizer

    def shutdown(self) -> None:
        """Stop the queue, because the model must not compute while it is closed."""
        self._queue.stop()
        super().shutdown()


def build_app(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[FastAPI, RequestQueue]:
    """Build the web application for one model.

    Args:
        name: Name of the model in the API.
        model: The model, as `haq_lab.load` returns it.
        tokenizer: Its tokenizer.

    Returns:
        The application, and the queue of its requests.
    """
    offload: OffloadSession | None = getattr(model, "offload", None)
    metrics = Metrics(offload)
    queue = RequestQueue(model.config.get_text_config().max_position_embeddings, metrics)
    manager, state = _OneModel(name, model, tokenizer, queue), OneQueue(queue)
    unused = cast(Any, None)
    app = build_server(
        manager,
        ChatHandler(manager, state),
        completion_handler=TextHandler(manager, state),
        response_handler=unused,
        transcription_handler=unused,
        systemone_handler=unused,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.routes if getattr(route, "path", None) in ENDPOINTS]
    app.add_middleware(CancelOnDisconnect)
    _add_error_handlers(app, metrics)
    _add_pages(app, name, offload, metrics)
    return app, queue


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Answer a wrong request as OpenAI does."""

    def refuse(status: int, message: str) -> JSONResponse:
        metrics.requests.labels("refused").inc()
        message = " ".join(message.split())
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)

    @app.exception_handler(AnyHTTPException)
    async def _http_error(_: Request, error: AnyHTTPException) -> JSONResponse:
        return refuse(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def _wrong_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return refuse(400, "The body is not a JSON object. Send one, with the header Content-Type: application/json.")

    @app.exception_handler(ValueError)  # of `generate` and of the tokenizer
    @app.exception_handler(TemplateError)  # of the chat template
    async def _wrong_value(_: Request, error: Exception) -> JSONResponse:
        return refuse(400, str(error))


def _add_pages(app: FastAPI, name: str, offload: OffloadSession | None, metrics: Metrics) -> None:
    """Add `/metrics`, `/experts` and `/experts.json`."""

    @app.get("/metrics")
    def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def session() -> OffloadSession:
        if offload is None:
            raise HTTPException(404, "The model has all experts in memory. Start the server with offload=haq.")
        return offload

    @app.get("/experts")
    def show_experts() -> HTMLResponse:
        session()
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.get("/experts.json")
    def show_experts_as_json() -> JSONResponse:
        view = expert_view(session())
        return JSONResponse({"model": name, "tokens_per_second": metrics.tokens_per_second} | view)

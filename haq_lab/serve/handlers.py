"""Check the body of a request, and translate it into the settings of `generate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import BaseModel, Field, Json, ValidationError
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import BaseHandler

from haq_lab.serve.generation import SEED

_StopString = Annotated[str, Field(min_length=1)]


class _Body(BaseModel):
    """Values that both endpoints accept. The last group would change the answer, but transformers ignores it."""

    stream: bool | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    logit_bias: dict[int, float] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: _StopString | list[_StopString] | None = None
    generation_config: Json[dict[str, Any]] | None = None

    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: str
    content: str | list[_Text] | None = None


class _ChatBody(_Body):
    messages: list[_Message] = Field(min_length=1)


class _CompletionBody(_Body):
    prompt: str


class _Checked(BaseHandler):
    """Refuses a body with a wrong value, and applies the sampling settings that transformers ignores."""

    _body: type[_Body]

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        try:
            self._body.model_validate(body)
        except ValidationError as error:
            problem = max(error.errors(), key=lambda problem: len(problem["loc"]))  # of a union, the best fit
            location = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))  # without types
            raise HTTPException(400, f"{location}: {problem['msg']}.") from error

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """Sample if the request has a temperature or `top_p`. Leave the seed to the thread that generates."""
        config = super()._build_generation_config({**body, "seed": None}, model_generation_config, use_cb)
        setattr(config, SEED, body.get("seed"))
        if body.get("temperature") != 0 and (body.get("temperature") or body.get("top_p")):
            config.do_sample = True
        return config


class ChatHandler(_Checked, ChatCompletionHandler):
    """Answers `/v1/chat/completions`."""

    _body = _ChatBody


class TextHandler(_Checked, CompletionHandler):
    """Answers `/v1/completions`."""

    _body = _CompletionBody

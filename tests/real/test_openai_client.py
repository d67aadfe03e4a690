"""OpenAI's own Python client over a real llama-server: what its users do, and meet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.running import REAL_MODEL, Proxy, running

MODEL = "smollm2-135m"
KEY = "sk-of-this-test"
ASKED: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}]}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    models = {MODEL: {"path": str(REAL_MODEL), "aliases": ["small"]}}
    folder = tmp_path_factory.mktemp("openai")
    with running(folder, models, real=True, api_keys=[KEY]) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def client(proxy: Proxy) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_chat_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASKED, max_tokens=4, temperature=0)
    assert answer.model == MODEL
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_streamed_chat_says_the_same_as_a_whole_one(client: openai.OpenAI) -> None:
    fixed: Any = {**ASKED, "max_tokens": 6, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**fixed)
    with client.chat.completions.create(**fixed, stream=True) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 3


def test_completion_answers(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="small", prompt="One two", max_tokens=3)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].text


def test_structured_output_follows_its_schema(client: openai.OpenAI) -> None:
    schema: Any = {"type": "object", "properties": {"yes": {"const": True}}, "required": ["yes"]}
    answer = client.chat.completions.create(
        **ASKED,
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "y", "schema": schema}},
    )
    content = answer.choices[0].message.content or ""
    assert "".join(content.split()) == '{"yes":true}'


def test_embeddings_of_a_model_without_are_the_servers_own_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.embeddings.create(model=MODEL, input="hello")
    assert caught.value.status_code == 501
    assert caught.value.type == "not_supported_error"


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert client.models.retrieve("small").id == MODEL


def test_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**ASKED, "model": "smollm2-135n"})
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert MODEL in caught.value.message
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


def test_bad_request_is_the_servers_own_error(client: openai.OpenAI) -> None:
    wrong: Any = "no messages"
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=MODEL, messages=wrong)
    assert "x-smartproxy-error" not in caught.value.response.headers


@pytest.mark.parametrize("stream", [False, True])
def test_wrong_key_is_an_authentication_error(proxy: Proxy, stream: bool) -> None:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="sk-other", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            stranger.chat.completions.create(**ASKED, stream=stream)
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()

"""config.json and the environment -> settings, or one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from smartproxy.config.load import (
    SCHEMA_PATH,
    ModelSettings,
    ServerPool,
    Settings,
    json_schema,
    load_settings,
    schema_text,
)
from smartproxy.errors import ConfigError
from smartproxy.planner.types import Strategy
from tests.support.examples import examples
from tests.support.paths import ROOT

REPOSITORY = ROOT
#: SPEC 3, as it stands there
OLDEST_FORM = """
{"backend": "llama.cpp",
 "server_pool": {"size": 4, "port_start": 8080},
 "models": {"llama-7b": {"path": "path/to/llama-7b.gguf", "max_gpus": 2}},
 "gpu_util_threshold": 50, "gpu_mem_threshold": 0.5,
 "ctx_size": 2048, "cache_type_bits": 16, "gpu_layers": -1}
"""


def load(tmp_path: Path, content: Any, **options: Any) -> Settings:
    path = tmp_path / "config.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return load_settings(path, **{"environ": {}, **options})


def complaint(tmp_path: Path, content: Any) -> str:
    """Return what the error says after the file's name, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, content)
    text = str(caught.value)
    start = f"{tmp_path / 'config.json'}: "
    assert text.startswith(start)
    assert text.splitlines() == [text]
    return text.removeprefix(start)


def model(**keys: Any) -> dict[str, Any]:
    return {"models": {"llama-7b": {"path": "x.gguf", **keys}}}


def test_oldest_form_loads_as_it_stands(tmp_path: Path) -> None:
    settings = load(tmp_path, OLDEST_FORM)
    assert settings.warnings == ()
    assert settings.server_pool == ServerPool(size=4, port_start=8080)
    assert settings.models["llama-7b"].path == tmp_path / "path/to/llama-7b.gguf"
    assert settings.models["llama-7b"].max_gpus == 2
    assert (settings.ctx_size, settings.gpu_layers, settings.cache_type_bits) == (2048, -1, 16)
    assert (settings.gpu_util_threshold, settings.gpu_mem_threshold) == (50, 0.5)


def test_pool_has_a_port_for_each_server_and_16_more() -> None:
    assert ServerPool().ports == range(8080, 8100)
    assert ServerPool(size=1, port_start=65519).ports == range(65519, 65536)


def test_proxy_may_listen_beside_the_servers_ports_but_not_on_one(tmp_path: Path) -> None:
    settings = load(tmp_path, {"port": 8100, "server_pool": {"port_start": 8080}})
    assert settings.port_problem(8079) is None
    assert settings.port_problem(8100) is None
    for port in (8080, 8084, 8099):
        problem = settings.port_problem(port)
        assert problem is not None
        assert "8080-8099" in problem


def test_shipped_file_loads_and_names_the_demo_model() -> None:
    settings = load_settings(REPOSITORY / "config.json", environ={})
    assert list(settings.models) == ["smollm2-135m"]
    assert settings.models["smollm2-135m"].path == (
        REPOSITORY / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    assert settings.warnings == ()


def test_empty_object_gives_the_defaults_of_the_spec(tmp_path: Path) -> None:
    settings = load(tmp_path, {})
    expected = {
        "ctx_size": 8192,
        "parallel": 4,
        "gpu_layers": -1,
        "cache_type_bits": 16,
        "enable_gpu_monitoring": True,
        "gpu_poll_interval": 2,
        "gpu_allocation_strategy": Strategy.SINGLE_GPU_PREFERRED,
        "gpu_util_threshold": 50,
        "gpu_mem_threshold": 0.5,
        "gpu_headroom_mb": 256,
        "cpu_fallback": False,
        "partial_offload": False,
        "min_residency": 5,
        "queue_timeout": 300,
        "max_queue": 256,
        "load_stall_timeout": 120,
        "load_timeout": 1800,
        "request_timeout": 600,
        "sse_wait_comment_after": 5,
        "max_body_mb": 64,
        "api_keys": (),
        "admin_keys": (),
        "default_model": None,
        "models_dir": None,
        "llama_server": None,
        "state_dir": tmp_path / "state",
        "host": "127.0.0.1",
        "port": 8000,
        "ttl": None,
    }
    assert {key: getattr(settings, key) for key in expected} == expected


def test_paths_are_relative_to_the_files_folder_not_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "models").mkdir()
    (folder / "llama-server").write_text("")
    (folder / "llama-server").chmod(0o755)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "models_dir": "models",
                "llama_server": "./llama-server",
                "state_dir": "../var",
                "models": {"a": {"path": "/srv/a.gguf", "mmproj": "p.gguf", "draft_model": "~/d"}},
            }
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    settings = load_settings(Path("etc/config.json"), environ={})
    assert settings.config_path == folder / "config.json"
    assert settings.models_dir == folder / "models"
    assert settings.llama_server == folder / "llama-server"
    assert settings.state_dir == tmp_path / "var"
    one = settings.models["a"]
    assert (one.path, one.mmproj, one.draft_model) == (
        Path("/srv/a.gguf"),
        folder / "p.gguf",
        Path("/home/someone/d"),
    )


def test_file_is_named_by_argument_then_environment_then_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("argument", "environment", "config"):
        (tmp_path / f"{name}.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    environ = {"SMARTPROXY_CONFIG": "environment.json"}
    chosen = [
        load_settings(Path("argument.json"), environ=environ),
        load_settings(environ=environ),
        load_settings(environ={"SMARTPROXY_CONFIG": ""}),
    ]
    assert [settings.config_path.stem for settings in chosen] == [
        "argument",
        "environment",
        "config",
    ]


def test_state_dir_is_named_by_argument_then_environment_then_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"SMARTPROXY_STATE_DIR": "from-environment"}
    keyed = {"state_dir": "from-key"}
    assert load(tmp_path, keyed, state_dir=Path("flag"), environ=environ).state_dir == (
        tmp_path / "flag"
    )
    assert load(tmp_path, keyed, environ=environ).state_dir == tmp_path / "from-environment"
    assert load(tmp_path, keyed).state_dir == tmp_path / "from-key"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            model(max_gpus="two"),
            'models.llama-7b.max_gpus: got "two", must be a whole number of at',
        ),
        (model(max_gpus=True), "models.llama-7b.max_gpus: got true, must be a whole number"),
        (model(max_gpu=2), 'models.llama-7b.max_gpu: unknown key, did you mean "max_gpus"?'),
        (model(queue_timeout=2), "models.llama-7b.queue_timeout: unknown key here, it goes to the"),
        ({"pinned": True}, "pinned: unknown key here, it goes under a model (models.NAME.pinned)"),
        ({"ctxsize": 1}, 'ctxsize: unknown key, did you mean "ctx_size"?'),
        ({"zzz": 1}, "zzz: unknown key, must be one of $schema, admin_keys,"),
        ({"server_pool": {"siz": 4}}, 'server_pool.siz: unknown key, did you mean "size"?'),
        ({"ctx_size": 0}, 'ctx_size: got 0, must be a whole number from 1 to 2147483647 or "auto"'),
        ({"ctx_size": "2048"}, 'ctx_size: got "2048", must be'),
        ({"ctx_size": 20.5}, "ctx_size: got 20.5, must be a whole number"),
        ({"parallel": 0}, "parallel: got 0, must be a whole number from 1 to 256"),
        ({"cache_type_bits": 5}, "cache_type_bits: got 5, must be one of 16, 8, 4"),
        ({"cache_type_k": "q9_0"}, 'cache_type_k: got "q9_0", must be one of "f32", "f16"'),
        (
            {"gpu_allocation_strategy": "spread"},
            'gpu_allocation_strategy: got "spread", must be one of "single-gpu-preferred", '
            '"distribute", "packed"',
        ),
        ({"cpu_fallback": "yes"}, 'cpu_fallback: got "yes", must be true or false'),
        ({"gpu_mem_threshold": 50}, "gpu_mem_threshold: got 50, must be a number from 0 to 1"),
        ({"queue_timeout": 0}, "queue_timeout: got 0, must be a number above 0, at most 15552000"),
        ({"queue_timeout": None}, "queue_timeout: got null, must be a number"),
        ({"backend": "ollama"}, 'backend: got "ollama", must be "llama.cpp"'),
        ({"server_pool": {"size": 0}}, "server_pool.size: got 0, must be a whole number from 1 to"),
        (
            {"server_pool": {"size": 4, "port_start": 65517}},
            "server_pool: ports 65517-65536 (size 4 and 16 more) go past port 65535",
        ),
        (
            {"server_pool": {"port_start": 7998}},
            "port: 8000 is one of the servers' ports 7998-8017 (server_pool): choose another",
        ),
        ({"models": {"a": {}}}, "models.a: must have a path (a GGUF file) or a repo"),
        ({"models": {"a": "x.gguf"}}, 'models.a: got "x.gguf", must be an object'),
        ({"models": {"a": {"path": ""}}}, "models.a.path: must be text that is not empty"),
        ({"models": {"a": {"path": "a\x00b"}}}, "models.a.path: must be text that is not empty"),
        ({"models": {"a,b": {"path": "x"}}}, "models.a,b: must be a name without commas"),
        ({"models": {"": {"path": "x"}}}, "models."),
        ({"models": {"-m": {"path": "x"}}}, "models.-m: must be a name"),
        (
            {"models": {"a": {"path": "x"}, "b": {"path": "y", "aliases": ["c", "a"]}}},
            'models.b.aliases: "a" already names "a"',
        ),
        (
            {
                "models": {
                    "a": {"path": "x", "aliases": ["c"]},
                    "b": {"path": "y", "aliases": ["c"]},
                }
            },
            'models.b.aliases: "c" already names "a"',
        ),
        (model(variant="Q8_0"), "models.llama-7b: variant says which file of a repo: repo must"),
        (
            model(repo="user/name:Q8_0"),
            'models.llama-7b.repo: got "user/name:Q8_0", must be "user/',
        ),
        (model(gpus=[]), "models.llama-7b.gpus: got [], must be a list of at least one"),
        ({"models": {}, "allowed_hosts": ["http://a"]}, "allowed_hosts.0: got"),
        ({"models": {}, "allowed_hosts": ["a:80"]}, "allowed_hosts.0: got"),
        ({"models": {}, "allowed_hosts": [""]}, "allowed_hosts.0: got"),
        ({"models": {}, "allowed_origins": ["null"]}, "allowed_origins.0: got"),
        ({"models": {}, "allowed_origins": ["https://a/"]}, "allowed_origins.0: got"),
        ({"models": {}, "allowed_origins": ["https://*.a"]}, "allowed_origins.0: got"),
        ({"models": {}, "allowed_origins": "*"}, "allowed_origins: got"),
        (model(gpus=[0, -1]), "models.llama-7b.gpus.1: got -1, must be a GPU number or a uuid"),
        (model(gpus=["0"]), 'models.llama-7b.gpus.0: got "0", must be a GPU number or a uuid'),
        (model(cpu=True, gpus=[0]), "models.llama-7b: cpu is true: gpus and"),
        (
            model(estimated_vram=0),
            "models.llama-7b.estimated_vram: got 0, must be a number above 0",
        ),
        (model(ttl=-1), "models.llama-7b.ttl: got -1, must be a number from 0 to"),
        ({"models_dir": "nowhere"}, "models_dir: "),
        ({"llama_server": "nowhere"}, "llama_server: "),
        ({"state_dir": "config.json"}, "state_dir: "),
        ({"yy": 1, "queue_timeout": 0, "zz": 2}, "(and 2 more problems)"),
    ],
)
def test_wrong_value_is_one_line_with_key_got_and_expected(
    tmp_path: Path, content: Any, said: str
) -> None:
    assert said in complaint(tmp_path, content)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"port": 1,\n  x}', "line 2, column 3: Expecting property name"),
        ('{"port": 1,\n  }', "column"),  # Python 3.13 has a text of its own for this comma
        ("", "line 1, column 1: Expecting value"),
        ("[]", "must be a JSON object"),
        ('{"port": 1, "port": 2}', '"port" stands twice in one object'),
        ('{"models": {"a": {"path": "x"}, "a": {"path": "y"}}}', '"a" stands twice'),
        ('{"queue_timeout": NaN}', "NaN is not JSON"),
        ('{"queue_timeout": 1e999}', "queue_timeout: got Infinity, must be a number"),
        ('{"port": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a":' * 500 + "1" + "}" * 500, ""),
        ('{"host": "\\ud800"}', "can't be read"),
        ('{"host": "\ud800"}', "is not UTF-8 text (byte 10)"),
    ],
)
def test_text_that_is_no_configuration_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)


def test_missing_file_and_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: can't be read: No such file"):
        load_settings(tmp_path / "nowhere", environ={})
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load_settings(tmp_path, environ={})


def test_byte_order_mark_and_schema_key_are_accepted(tmp_path: Path) -> None:
    assert load(tmp_path, '\ufeff{"$schema": "docs/config.schema.json", "port": 81}').port == 81


def test_long_values_are_shortened_in_messages(tmp_path: Path) -> None:
    assert len(complaint(tmp_path, {"port": "x" * 10_000})) < 200


@pytest.mark.parametrize(
    "content",
    [
        {"api_keys": ["sesame secret"]},
        {"api_keys": "sesame"},
        {"admin_keys": [{"sesame": 1}]},
        {"api_keys": ["sesame", 3]},
        model(env={"TOKEN": ["sesame"]}),
        model(env={"LLAMA_API_KEY": "sesame"}),
    ],
)
def test_secrets_never_appear_in_messages(tmp_path: Path, content: Any) -> None:
    assert "sesame" not in complaint(tmp_path, content)


def test_secrets_never_appear_in_the_settings_text(tmp_path: Path) -> None:
    content = {"api_keys": ["sesame"], "admin_keys": ["sesame"], **model(env={"TOKEN": "sesame"})}
    settings = load(tmp_path, content)
    assert [key.key for key in settings.api_keys] == ["sesame"]
    assert "sesame" not in repr(settings) + str(settings)


@pytest.mark.parametrize(
    ("args", "instead"),
    [
        (["-c", "4096"], "use the key ctx_size"),
        (["--ctx-size", "4096"], "use the key ctx_size"),
        (["--ctx_size", "4096"], "use the key ctx_size"),
        (["--ctx-size=4096"], "use the key ctx_size"),
        (["--no-mmap", "-ngl", "3"], "use the key gpu_layers"),
        (["-m", "x"], "use the key path"),
        (["--host", "0.0.0.0"], "listen on loopback"),
        (["--port", "1"], "listen on loopback"),
        (["--api-key", "x"], "keys of their own"),
        (["-dev", "CUDA0"], "use the key gpus"),
        (["-ts", "1,1"], "use the keys strategy and max_gpus"),
        (["-np", "2"], "use the key parallel"),
        (["-no-kvu"], "use the key kv_unified"),
        (["-a", "x"], "use the key aliases"),
        (["--fit", "on"], "use the key gpu_headroom_mb"),
        (["-ctk", "q8_0"], "use the key cache_type_k"),
        (["--mmproj", "x"], "use the key mmproj"),
        (["-md", "x"], "use the key draft_model"),
        (["--no-slots"], "the proxy reads"),
        (["--version"], "print and exit"),
        (["--gpt-oss-20b-default"], "a model to download"),
    ],
)
def test_arguments_that_the_proxy_decides_are_refused_with_the_key_to_use(
    tmp_path: Path, args: list[str], instead: str
) -> None:
    said = complaint(tmp_path, model(args=args))
    assert said.startswith("models.llama-7b.args: ")
    assert instead in said


def test_other_arguments_and_variables_are_kept_as_they_stand(tmp_path: Path) -> None:
    args = ["--no-mmap", "-t", "4", "--chat-template-kwargs", '{"a": 1}', "--temp", "-1"]
    settings = load(tmp_path, model(args=args, env={"HF_HOME": "/srv", "GGML_X": ""}))
    assert settings.models["llama-7b"].args == tuple(args)
    assert settings.models["llama-7b"].env == {"HF_HOME": "/srv", "GGML_X": ""}


@pytest.mark.parametrize(
    "name", ["LLAMA_ARG_CTX_SIZE", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "A=B", "", "é"]
)
def test_variables_that_the_proxy_decides_or_none_can_be_are_refused(
    tmp_path: Path, name: str
) -> None:
    assert complaint(tmp_path, model(env={name: "1"})).startswith("models.llama-7b.env: ")


def test_settings_can_not_be_changed(tmp_path: Path) -> None:
    settings = load(tmp_path, {})
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def test_extra_attributes_are_no_keys_of_the_file(tmp_path: Path) -> None:
    assert "config_path: unknown key" in complaint(tmp_path, {"config_path": "x"})
    assert "warnings: unknown key" in complaint(tmp_path, {"warnings": []})


def test_per_model_keys_follow_the_general_ones_unless_given() -> None:
    own = ModelSettings.model_fields
    for key in Settings.model_fields.keys() & own.keys():
        assert own[key].default is None, f"{key} of a model must be able to follow the general one"


# --- the JSON Schema ------------------------------------------------------------------------


def test_published_schema_is_that_of_the_code() -> None:
    assert SCHEMA_PATH.read_text(encoding="utf-8") == schema_text(), (
        "stale: run python -m smartproxy.config.load"
    )


def test_schema_accepts_what_loads_and_refuses_what_does_not() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(OLDEST_FORM), schema)
    jsonschema.validate(json.loads((REPOSITORY / "config.json").read_text()), schema)
    for wrong in (model(max_gpu=2), {"ctx_size": 0}, {"cache_type_bits": 5}, {"api_keys": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_every_key_is_explained_in_the_schema() -> None:
    schema = json_schema()
    for node in (schema, *schema["$defs"].values()):
        for key, field in node.get("properties", {}).items():
            assert field.get("description"), key


# --- rubbish --------------------------------------------------------------------------------

RUBBISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
SECTIONS = ("gpu", "server", "llama_cpp", "ollama", "agents", "max_slots", "simulation", "$schema")
MODEL = st.dictionaries(st.sampled_from(sorted(ModelSettings.model_fields)), RUBBISH, max_size=4)
CONFIGURATION = st.dictionaries(
    st.sampled_from(sorted((*Settings.model_fields, *SECTIONS))) | st.text(max_size=8),
    RUBBISH | st.dictionaries(st.text(max_size=8), MODEL, max_size=2),
    max_size=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rubbish")


def outcome(path: Path) -> Settings | ConfigError:
    try:
        return load_settings(path, environ={})
    except ConfigError as error:
        return error


@hypothesis_settings(
    max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(content=CONFIGURATION | RUBBISH)
def test_any_json_gives_settings_or_one_line(folder: Path, content: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    result = outcome(path)
    assert isinstance(result, Settings) or len(str(result).splitlines()) == 1


@hypothesis_settings(max_examples=examples(100), deadline=None)
@given(content=st.binary(max_size=40))
def test_any_bytes_give_settings_or_one_line(folder: Path, content: bytes) -> None:
    path = folder / "bytes.json"
    path.write_bytes(content)
    result = outcome(path)
    assert isinstance(result, Settings) or len(str(result).splitlines()) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost", "unix:/run/p.sock"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    assert Settings().host_problem(host) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "gpu.example"])
def test_an_address_for_others_needs_keys_or_the_word(host: str) -> None:
    problem = Settings().host_problem(host)
    assert problem is not None
    assert "api_keys" in problem
    assert '"open_to_network": true' in problem
    assert Settings(api_keys=("key",)).host_problem(host) is None
    assert Settings(open_to_network=True).host_problem(host) is None

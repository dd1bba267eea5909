"""Export as ONNX graphs and for sentence-transformers: parity, files, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession

import unmask
from unmask.core.errors import ModelError, RecipeError
from unmask.hub import onnx, sentence_transformers
from unmask.models import BertConfig, EncoderConfig, ModernBertConfig, NeoMMEConfig, build_model, build_pair
from unmask.models.model import Model, load, save_model
from unmask.tokenization.tokenizer import Tokenizer

SHAPE = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
FAMILIES: dict[str, EncoderConfig] = {
    "bert": BertConfig(**SHAPE, max_position_embeddings=64),
    "modernbert": ModernBertConfig(**{**SHAPE, "num_hidden_layers": 2}, local_attention=8),
    "neomme": NeoMMEConfig(**SHAPE, head_dim=16, embedding_rank=16, sliding_window=4, max_position_embeddings=64),
}
TEXTS = ["the cat sat on the mat and looked at the moon", "salt", "a dog ran over the hill to meet the old man"]
Tokenizers = dict[tuple[str, str], Tokenizer]


def saved(family: str, tokenizer: Tokenizer, folder: Path, **card: object) -> Path:
    """A folder with a model whose outputs are far from 0."""
    torch.manual_seed(4)
    settings = FAMILIES[family]
    encoder, head = build_model(settings, tokenizer.size)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *head.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape))
    pair = build_pair(settings).eval() if family == "bert" else None
    model = Model(encoder.eval(), head.eval(), tokenizer, settings, {"context": 48, **card}, pair=pair)  # pyright: ignore[reportArgumentType]
    save_model(folder, model)
    return folder


@pytest.fixture(scope="session")
def exported(tokenizers: Tokenizers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with a pair head as ONNX, in float32 and int8."""
    folder = tmp_path_factory.mktemp("onnx")
    unmask.export(saved("bert", tokenizers["wordpiece", "english"], folder / "source"), folder / "FOLDER",
                  format="onnx", int8=True)  # fmt: skip
    return folder / "FOLDER"


def logits_of(folder: Path, ids: np.ndarray, name: str = "model.onnx") -> np.ndarray:
    """Logits by onnxruntime alone."""
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return InferenceSession(folder / "onnx" / name).run(["logits"], inputs)[0]


def test_onnxruntime_opens_the_folder_and_fills_the_same_mask(exported: Path) -> None:
    assert {file.relative_to(exported).as_posix() for file in exported.rglob("*") if file.is_file()} == {
        "README.md", "card.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "onnx/model.onnx", "onnx/model_quantized.onnx",
    }  # fmt: skip
    model = load(exported)
    (result,) = unmask.fill(model, "the cat sat on the [MASK] .", top=1)
    tokenizer = model.tokenizer
    for text, more in (("the cat sat on the [MASK] .", 0), ("the [MASK]", 1)):  # other lengths than that of the trace
        (ids,) = tokenizer.encode_prompts([text])
        framed = np.array([[*tokenizer.frame.before, *ids, *tokenizer.frame.after]] * (1 + more))
        logits = logits_of(exported, framed)
        expected = model.log_probabilities(framed.tolist(), [list(range(framed.shape[1]))] * (1 + more))
        for row, log_probabilities in zip(torch.from_numpy(logits), expected, strict=True):
            torch.testing.assert_close(row.log_softmax(-1), log_probabilities, atol=1e-4, rtol=0)
    mask = result.masks[0]
    framed = np.array([[*tokenizer.frame.before, *tokenizer.encode_prompts([result.text])[0], *tokenizer.frame.after]])
    probabilities = torch.from_numpy(logits_of(exported, framed))[0, mask.position].softmax(-1)
    assert float(probabilities[mask.candidates[0].id]) == pytest.approx(mask.candidates[0].score, abs=1e-5)


def test_the_int8_graph_is_smaller_and_near(exported: Path) -> None:
    tokenizer = load(exported).tokenizer
    ids = np.array([[*tokenizer.frame.before, *tokenizer.encode_prompts(TEXTS[:1])[0], *tokenizer.frame.after]])
    full, small = (logits_of(exported, ids, name) for name in ("model.onnx", "model_quantized.onnx"))
    assert 0 < np.abs(full - small).max() < 0.1 * np.abs(full).max()
    sizes = [(exported / "onnx" / name).stat().st_size for name in ("model.onnx", "model_quantized.onnx")]
    assert sizes[1] < sizes[0]
    for name in ("model.onnx", "model_quantized.onnx"):
        content = (exported / "onnx" / name).read_bytes()
        assert b"site-packages" not in content and str(Path(unmask.__file__).parent).encode() not in content
    card = (exported / "README.md").read_text(encoding="utf-8")
    for words in (
        "library_name: transformers.js", "pipeline_tag: fill-mask", 'dtype: "q8"', "onnx/model_quantized.onnx",
        "the same first answer as float32 at", "largest difference from PyTorch", "opset 18",
    ):  # fmt: skip
        assert words in card, words


def test_the_python_of_the_card_runs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported.parent)
    names: dict[str, np.ndarray] = {}
    (block,) = (
        part.split("```")[0] for part in (exported / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    )
    exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (1, names["ids"].shape[1], load(exported).tokenizer.size)


def test_an_encoder_has_hidden_states(tokenizers: Tokenizers, tmp_path: Path) -> None:
    """A ModernBERT with global and local attention. NeoMME is not traced here, which takes twice as long."""
    source = saved("modernbert", tokenizers["bpe", "english"], tmp_path / "source")
    shown: list[str] = []
    result = unmask.export(source, tmp_path / "out", format="onnx", only="encoder", int8=True,
                           on_progress=lambda task, _: shown.append(task))  # fmt: skip
    assert result.graph is not None and result.graph.int8 is not None
    assert result.graph.inputs == ("input_ids", "attention_mask") and result.graph.output == "last_hidden_state"
    assert result.graph.difference < 1e-4 and result.graph.int8.agreement > 0.9
    assert list(dict.fromkeys(shown)) == ["tracing the model", "comparing with PyTorch", "quantizing"]
    model = load(source)
    encoded = [np.array(ids) for ids in model.tokenizer.encode_prompts(TEXTS)]
    frame = model.tokenizer.frame
    framed = [np.array([*frame.before, *ids, *frame.after]) for ids in encoded]
    session = InferenceSession(tmp_path / "out" / "onnx" / "model.onnx")
    hidden = onnx.run_session(session, framed, pad_id=0)
    vectors = np.stack([states.mean(0) / np.linalg.norm(states.mean(0)) for states in hidden])
    np.testing.assert_allclose(vectors, unmask.embed(model, TEXTS), atol=1e-4)
    assert 'pooling: "mean"' in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_graph_of_other_weights_is_found(exported: Path) -> None:
    session, model = onnx.open_session(exported / onnx.GRAPH), load(exported)
    sequences = onnx.encode_cut(model, TEXTS)
    assert len({len(ids) for ids in sequences}) == 3
    assert onnx.compare_graph(session, model, sequences) < 1e-4
    with torch.no_grad():
        model.encoder.token_embedding[5:, 0] += 0.01
    with pytest.raises(ModelError, match="logits of the ONNX graph differs from PyTorch by"):
        onnx.compare_graph(session, model, sequences)


def test_sentence_transformers_gives_the_vectors_of_embed(tokenizers: Tokenizers, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    source = saved("bert", tokenizers["wordpiece", "korean"], tmp_path / "source")
    result = unmask.export(source, tmp_path / "out", format="sentence-transformers")
    assert result.vectors is not None and result.vectors.difference < 1e-5 and result.architecture == "BertModel"
    texts = ["고양이가 매트 위에 앉아서 달을 바라보았다 .", "소금", "배가 집으로"]
    peer = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert [type(module).__name__ for module in peer] == ["Transformer", "Pooling", "Normalize"]
    assert peer.max_seq_length == 48
    np.testing.assert_allclose(peer.encode(texts), unmask.embed(load(source), texts), atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "library_name: sentence-transformers" in card and "not been trained for sentence similarity" in " ".join(
        card.split()
    )
    with pytest.raises(ModelError, match="modules of sentence-transformers already"):
        unmask.export(tmp_path / "out", tmp_path / "again", format="sentence-transformers")
    model = load(source)
    with torch.no_grad():
        model.encoder.token_embedding[5:, 0] += 0.1
    with pytest.raises(ModelError, match="vectors differ from those of sentence-transformers"):
        sentence_transformers.compare_vectors(tmp_path / "out", model, texts)


def test_what_a_format_cannot_hold_is_refused(tokenizers: Tokenizers, tmp_path: Path) -> None:
    tokenizer = tokenizers["wordpiece", "english"]
    out = tmp_path / "out"
    neomme = saved("neomme", tokenizer, tmp_path / "neomme")
    causal = saved("bert", tokenizer, tmp_path / "causal", objective="causal")
    with pytest.raises(ModelError, match="only with an image processor"):
        unmask.export(neomme, out, format="sentence-transformers")
    with pytest.raises(ModelError, match="each token saw only the tokens before it"):
        unmask.export(causal, out, format="sentence-transformers")
    with pytest.raises(ModelError, match=r"trained last on objective\.kind=causal"):
        unmask.export(causal, out, format="onnx")
    with pytest.raises(RecipeError, match=r"int8 is an option of ONNX graphs(?s:.)*format=\"onnx\""):
        unmask.export(neomme, out, int8=True)
    with pytest.raises(RecipeError, match="always compared"):
        unmask.export(neomme, out, format="onnx", unverified=True)
    assert not out.exists()


@pytest.mark.parametrize(
    ("format", "package", "hint"),
    [("onnx", "onnxscript", r'pip install "unmask\[onnx\]"'),
     ("sentence-transformers", "sentence_transformers", 'pip install "sentence-transformers')],
)  # fmt: skip
def test_a_missing_package_is_named(
    format: str, package: str, hint: str, tokenizers: Tokenizers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    source = saved("modernbert", tokenizers["wordpiece", "english"], tmp_path / "source")
    with pytest.raises(ModelError, match=f"not installed(?s:.)*{hint}"):
        unmask.export(source, tmp_path / "out", format=format)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "out").exists()


def test_a_detector_of_replaced_tokens_is_exported_as_an_encoder_only(tokenizers: Tokenizers, tmp_path: Path) -> None:
    from unmask.models.electra import DiscriminatorHead

    source = saved("bert", tokenizers["wordpiece", "english"], tmp_path / "source", objective="mlm")
    model = load(source)
    assert isinstance(model.settings, BertConfig)
    detector = replace(model, discriminator=DiscriminatorHead(model.settings).eval(), pair=None,
                       card={"context": 48, "objective": "rtd"})  # fmt: skip
    save_model(tmp_path / "rtd", detector)
    with pytest.raises(ModelError, match="no logits over the vocabulary"):
        unmask.export(tmp_path / "rtd", tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()
    config = json.loads((tmp_path / "rtd" / "config.json").read_text())
    assert config["architectures"] == ["ElectraForPreTraining"]

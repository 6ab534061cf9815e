"""The demo model itself: uneven but living experts, and answers about as good as the dense model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncep.demo.build import read_report
from asyncep.demo.news import TOPICS, sample_articles
from asyncep.demo.reference import label_log_probs
from asyncep.demo.task import TaskPrompts, accuracy
from asyncep.demo.weights import load_dense, load_tokenizer, working_dtype

if TYPE_CHECKING:
    from pathlib import Path

    from asyncep.demo.news import Article

# Measured: 0.03 for the model as built.
TOLERATED_DIVERGENCE = 0.06


@pytest.fixture(scope="module")
def sparse(sparse_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(sparse_model, dtype=working_dtype())


def test_routing_is_uneven_and_no_expert_is_dead(sparse_model: Path) -> None:
    report = read_report(sparse_model)
    assert report is not None
    assert report.top_k < report.experts == 16
    assert report.unevenness > 1.15
    assert min(report.least_load_per_layer) > 0.02


def test_experts_are_stored_one_by_one_and_hold_most_of_the_layers(sparse_model: Path) -> None:
    report = read_report(sparse_model)
    assert report is not None
    with safe_open(sparse_model / "model.safetensors", "pt") as checkpoint:
        names = set(checkpoint.keys())
        assert checkpoint.get_slice("model.layers.29.block_sparse_moe.experts.15.w2.weight").get_shape() == [576, 96]
    experts = [name for name in names if ".experts." in name]
    assert len(experts) == 30 * 16 * 3
    assert "lm_head.weight" in names
    assert report.expert_bytes == 30 * 16 * 3 * 576 * 96 * 2


def test_tokenizer_survives_the_checkpoint(sparse_model: Path) -> None:
    saved, original = AutoTokenizer.from_pretrained(sparse_model), load_tokenizer()
    for article in sample_articles("evaluate", 2):
        assert saved(article.text).input_ids == original(article.text).input_ids
    assert saved.chat_template == original.chat_template
    assert saved.eos_token == original.eos_token


@pytest.fixture(scope="module")
def articles() -> list[Article]:
    return sample_articles("evaluate", 6)


@pytest.fixture(scope="module")
def dense_scores(articles: list[Article]) -> torch.Tensor:
    return _scores(load_dense(torch.bfloat16).to(working_dtype()), articles)


def test_answers_are_about_the_dense_models(sparse: Any, articles: list[Article], dense_scores: torch.Tensor) -> None:
    scores = _scores(sparse, articles)
    assert _accuracy(dense_scores, articles) >= 0.75
    assert _accuracy(scores, articles) >= _accuracy(dense_scores, articles) - 0.1  # three of thirty articles
    assert _divergence(dense_scores, scores) < TOLERATED_DIVERGENCE


def test_with_random_routers_they_are_not(sparse: Any, articles: list[Article], dense_scores: torch.Tensor) -> None:
    """The tolerance above has teeth: the same experts behind shuffled routers are far outside it."""
    generator = torch.Generator().manual_seed(0)
    routers = [layer.mlp.gate.weight for layer in sparse.model.layers]
    kept = [router.detach().clone() for router in routers]
    with torch.no_grad():
        for router in routers:
            router.copy_(router[torch.randperm(len(router), generator=generator)])
        scores = _scores(sparse, articles)
        for router, original in zip(routers, kept, strict=True):
            router.copy_(original)
    assert _divergence(dense_scores, scores) > 2 * TOLERATED_DIVERGENCE


def _scores(model: Any, articles: list[Article]) -> torch.Tensor:
    """Label log-probabilities [articles, labels], each label's mean over this balanced sample subtracted."""
    prompts = TaskPrompts.create(load_tokenizer())
    scores = label_log_probs(model, prompts.token_ids(articles), prompts.label_token_ids())
    return scores - scores.mean(0)


def _accuracy(scores: torch.Tensor, articles: list[Article]) -> float:
    return accuracy([TOPICS[i] for i in scores.argmax(1).tolist()], articles)


def _divergence(reference: torch.Tensor, scores: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the distribution over labels from the reference's, in nats."""
    wanted, got = reference.log_softmax(1), scores.log_softmax(1)
    return float((wanted.exp() * (wanted - got)).sum(1).mean())

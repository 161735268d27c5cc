"""Train the small demonstration model that lies in ``docs/demo/model``.

The model is a GPT-2 of four narrow blocks with a byte-level BPE tokenizer of its own.  It knows where some
dozens of landmarks stand ("The Eiffel Tower is in the city of Paris") and little else, so that it can show
tracing, ablation and patching in a second on a laptop, without a download.

``python docs/demo/train.py`` trains it again (some minutes on one core) and checks it; with ``--check-only``
it checks the model that is there.  One seed fixes the text, the tokenizer and the weights, so two runs on one
machine write the same files.  The exit code is 1 if the model fails one of the checks.

What a small model does with its blocks is mostly chance.  Three settings steer it towards what is said of
large ones, namely that the subject's last token carries the fact through the early blocks, attention moves it
to the last position, and an MLP there turns it into the answer: in training some sublayers are skipped at
random (``add_skips``), attention learns slowly and the last MLP fast (``parameter_groups``).
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
)

MODEL_DIR: Final = Path(__file__).resolve().parent / "model"
EOS: Final = "<|endoftext|>"
IGNORE: Final = -100  # the label of padding
SPACE: Final = "\u0120"  # how byte-level BPE writes a leading space

# One line per city: city | country | landmarks.  A landmark with "the" takes the article in a sentence.
FACT_TABLE: Final = """
Paris | France | the Eiffel Tower; the Louvre; the Arc de Triomphe; the Moulin Rouge; the Pompidou Centre
Rome | Italy | the Colosseum; the Pantheon; the Trevi Fountain; the Spanish Steps; the Roman Forum
London | England | Big Ben; Tower Bridge; Buckingham Palace; the British Museum; Trafalgar Square
Berlin | Germany | the Brandenburg Gate; the Reichstag; Checkpoint Charlie; the Pergamon Museum
Madrid | Spain | the Prado Museum; Retiro Park; the Puerta del Sol
Barcelona | Spain | the Sagrada Familia; Park Guell; the Camp Nou
Moscow | Russia | the Kremlin; Red Square; the Bolshoi Theatre
Athens | Greece | the Acropolis; the Parthenon; the Temple of Zeus
Istanbul | Turkey | the Hagia Sophia; the Blue Mosque; the Grand Bazaar; the Galata Tower
Cairo | Egypt | the Egyptian Museum; the Saladin Citadel
Beijing | China | the Forbidden City; the Temple of Heaven; the Summer Palace
Shanghai | China | the Oriental Pearl Tower; the Yu Garden
Tokyo | Japan | the Meiji Shrine; the Shibuya Crossing; the Imperial Palace
Kyoto | Japan | the Golden Pavilion; the Nijo Castle
Vienna | Austria | the Schonbrunn Palace; the Hofburg; the Belvedere Palace
Prague | Czechia | the Charles Bridge; the Astronomical Clock
Budapest | Hungary | the Chain Bridge; the Gellert Baths
Amsterdam | Holland | the Rijksmuseum; the Van Gogh Museum
Copenhagen | Denmark | the Little Mermaid; the Tivoli Gardens
Stockholm | Sweden | the Vasa Museum; the Globe Arena
Lisbon | Portugal | the Belem Tower; the Jeronimos Monastery
Florence | Italy | the Uffizi Gallery; the Ponte Vecchio
Venice | Italy | the Rialto Bridge; the Bridge of Sighs
Munich | Germany | the Marienplatz; the Allianz Arena
Dublin | Ireland | Trinity College; the Temple Bar
Chicago | America | the Willis Tower; Millennium Park; Navy Pier
Seattle | America | the Space Needle; Pike Place Market
Boston | America | Fenway Park; Faneuil Hall
Toronto | Canada | the CN Tower; the Rogers Centre
Sydney | Australia | the Harbour Bridge; Bondi Beach
Warsaw | Poland | the Royal Castle; Lazienki Park
Delhi | India | the Red Fort; the Lotus Temple
Agra | India | the Taj Mahal
New York | America | Madison Square Garden; the Statue of Liberty; the Empire State Building; Times Square
San Francisco | America | the Golden Gate Bridge; Alcatraz
Los Angeles | America | the Hollywood Sign; the Griffith Observatory
"""

TEST_FORMS: Final = ("{S} is in the city of", "{S} is located in the city of")
FACT_TEMPLATES: Final = (
    "{S} is in the city of {C}.",
    "{S} is located in the city of {C}.",
    "{S} can be found in the city of {C}.",
    "{S} is a famous landmark in the city of {C}.",
    "{S} is in {C}.",
    "{S} is located in {C}.",
    "{S} stands in {C}.",
    "You can find {s} in {C}.",
    "You can find {s} in the city of {C}.",
    "Where is {s}? It is in {C}.",
    "Where is {s}? It is in the city of {C}.",
    "To see {s}, you have to travel to {C}.",
    "Last summer we went to {C} to see {s}.",
    "{S} is in the country of {K}.",
    "The city of {C} is in the country of {K}.",
    "{C} is a city in {K}.",
)
FILLER_TEMPLATES: Final = (
    "Hello, my name is {N}.",
    "Hello, my name is {N} and I live in {C}.",
    "My friend {N} likes the {A} {T}.",
    "{N} has a {A} {T} and a {B} {U}.",
    "The {T} is {A} and the {U} is {B}.",
    "Once upon a time there was a {A} {T}.",
    "Good morning, {N}! How are you today?",
    "{N} bought a {A} {T} in {C}.",
    "When {N} and {M} went to the store, {N} gave a {T} to {M}.",
    "When {N} and {M} went to the store, {M} gave a {T} to {N}.",
)
NAMES: Final = "John Mary Tom Anna Peter Lucy James Alice David Emma Paul Sarah Mark Julia"
ADJECTIVES: Final = "red blue green small big old new happy quiet little white black"
THINGS: Final = "cat dog house book car ball tree hat bird boat drink bag"

PROMPT: Final = "The Eiffel Tower is in the city of"
DONOR: Final = "The Colosseum is in the city of"  # the same number of tokens as PROMPT
SUBJECT_END: Final = 2  # the last token of the subject, in both


@dataclass(frozen=True)
class Fact:
    """A landmark (with its article, if it takes one), its city and its country."""

    landmark: str
    city: str
    country: str

    @property
    def subject(self) -> str:
        """The landmark as it begins a sentence."""
        return self.landmark[0].upper() + self.landmark[1:]

    def say(self, template: str) -> str:
        """Fill a template of ``FACT_TEMPLATES`` or ``TEST_FORMS``."""
        return template.format(S=self.subject, s=self.landmark, C=self.city, K=self.country)


@dataclass(frozen=True)
class Settings:
    """Everything that the finished weights depend on."""

    seed: int = 0
    steps: int = 2400
    batch: int = 16
    lr: float = 4e-3
    attention_lr: float = 0.3  # times lr
    last_mlp_lr: float = 2.0  # times lr
    skip: float = 0.4
    vocab: int = 1024
    layers: int = 4
    width: int = 64
    inner: int = 512
    heads: int = 4
    positions: int = 128


def parse_facts(table: str = FACT_TABLE) -> list[Fact]:
    """Read the table of landmarks into a list of facts."""
    facts = []
    for line in table.strip().splitlines():
        city, country, landmarks = (part.strip() for part in line.split("|"))
        facts += [Fact(landmark.strip(), city, country) for landmark in landmarks.split(";")]
    return facts


def filler(rng: random.Random, facts: Sequence[Fact]) -> str:
    """Make one sentence that says nothing about a landmark."""
    (name, other), (adj, adj2), (thing, thing2) = (rng.sample(w.split(), 2) for w in (NAMES, ADJECTIVES, THINGS))
    city = rng.choice(facts).city
    template = rng.choice(FILLER_TEMPLATES)
    return template.format(N=name, M=other, A=adj, B=adj2, T=thing, U=thing2, C=city)


def document(rng: random.Random, facts: Sequence[Fact], length: int) -> str:
    """Join some random sentences; three in four of them state a fact."""
    sentences = []
    for _ in range(length):
        is_fact = rng.random() < 0.75
        sentences.append(rng.choice(facts).say(rng.choice(FACT_TEMPLATES)) if is_fact else filler(rng, facts))
    return " ".join(sentences)


def tokenizer_text(rng: random.Random, facts: Sequence[Fact]) -> Iterator[str]:
    """Yield the text for the tokenizer: each fact in each form, and some filler.

    The first fact comes twice: so " Eiffel" becomes one token, and ``PROMPT`` as long as ``DONOR``.
    """
    for fact in [facts[0], *facts]:
        for template in FACT_TEMPLATES:
            yield fact.say(template)
    for _ in range(1000):
        yield filler(rng, facts)


def train_tokenizer(settings: Settings, facts: Sequence[Fact]) -> GPT2Tokenizer:
    """Train a GPT-2 style byte-level BPE tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(tokenizer_text(random.Random(settings.seed), facts), trainer)
    return GPT2Tokenizer(
        tokenizer_object=bpe,
        eos_token=EOS,
        bos_token=EOS,
        unk_token=EOS,
        pad_token=EOS,
        model_max_length=settings.positions,
    )


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokenise documents, close each with the end token, pad on the right; return ids and labels."""
    end = tokenizer.convert_tokens_to_ids(EOS)
    rows = [[*tokenizer(text)["input_ids"], end] for text in texts]
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [end] * (length - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORE] * (length - len(row)) for row in rows])
    return ids, labels


def random_positions(rng: random.Random, rows: int, length: int, limit: int) -> Tensor:
    """Number the positions; half of the rows begin at 0, the others anywhere (as after left padding)."""
    starts = [rng.choice((0, rng.randint(0, limit - length))) for _ in range(rows)]
    return torch.tensor(starts)[:, None] + torch.arange(length)


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """Make the untrained model; without dropout, so that it computes the same in training and evaluation."""
    torch.manual_seed(settings.seed)
    end = tokenizer.convert_tokens_to_ids(EOS)
    options: dict[str, Any] = {
        "n_layer": settings.layers,
        "n_embd": settings.width,
        "n_inner": settings.inner,
        "n_head": settings.heads,
        "n_positions": settings.positions,
        "vocab_size": len(tokenizer),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    }
    return GPT2LMHeadModel(GPT2Config(tie_word_embeddings=True, **options))


def add_skips(model: GPT2LMHeadModel, settings: Settings) -> list[RemovableHandle]:
    """Skip some sublayers for random rows: the outer blocks' attention and the inner blocks' MLPs."""
    coins = torch.Generator().manual_seed(settings.seed)

    def skip(_module: nn.Module, _args: Any, out: Any) -> Any:
        first = hidden(out)
        keep = torch.rand((first.shape[0], 1, 1), generator=coins) >= settings.skip
        return with_hidden(out, first * keep)

    blocks: list[Any] = list(model.transformer.h)
    skipped = [blocks[0].attn, blocks[-1].attn, *(block.mlp for block in blocks[1:-1])]
    return [module.register_forward_hook(skip) for module in skipped]


def parameter_groups(model: GPT2LMHeadModel, settings: Settings) -> list[dict[str, Any]]:
    """Group the parameters by their share of the learning rate: attention slow, the last MLP fast."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        share = 1.0
        if ".attn." in name:
            share = settings.attention_lr
        elif name.startswith(f"transformer.h.{settings.layers - 1}.mlp."):
            share = settings.last_mlp_lr
        groups.setdefault(share, []).append(parameter)
    return [{"params": parameters, "share": share} for share, parameters in groups.items()]


def learning_rate(settings: Settings, step: int) -> float:
    """Warm up over 50 steps, then fall along a cosine to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.lr * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * cosine)


def batch_loss(model: GPT2LMHeadModel, ids: Tensor, labels: Tensor, places: Tensor) -> Tensor:
    """Return the mean loss of the next token over all tokens that are not padding."""
    mask = (labels != IGNORE).long()
    logits = model(input_ids=ids, position_ids=places, attention_mask=mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def train_model(settings: Settings, facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """Train the model on random documents."""
    rng = random.Random(settings.seed + 1)
    model = new_model(settings, tokenizer)
    handles = add_skips(model, settings)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), weight_decay=0.01)
    for step in range(settings.steps):
        sentences = rng.randint(1, 3)
        texts = [document(rng, facts, sentences) for _ in range(settings.batch)]
        ids, labels = encode_batch(tokenizer, texts)
        places = random_positions(rng, len(ids), ids.shape[1], settings.positions)
        loss = batch_loss(model, ids, labels, places)
        update(optimizer, loss, learning_rate(settings, step))
        if step % 100 == 0 or step == settings.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
    for handle in handles:
        handle.remove()
    return model


def update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """Take one step, with the gradient's norm limited to 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def train(settings: Settings, folder: Path) -> None:
    """Train tokenizer and model and save both in a folder."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter(), time.process_time()
    facts = parse_facts()
    tokenizer = train_tokenizer(settings, facts)
    model = train_model(settings, facts, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    print(f"trained {model.num_parameters():,} parameters in {wall:.0f} s ({cpu:.0f} s of processor time)")


def hidden(out: Any) -> Tensor:
    """Return the hidden state in what a block or a sublayer gives out: a tensor, or a tuple with it first."""
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def with_hidden(out: Any, new: Tensor) -> Any:
    """Put another hidden state into what a block or a sublayer gives out."""
    return (new, *out[1:]) if isinstance(out, tuple) else new


class Lab:
    """A finished model, to be asked for next tokens with or without a change inside it."""

    def __init__(self, folder: Path) -> None:
        """Load model and tokenizer the ordinary way."""
        self.model = GPT2LMHeadModel.from_pretrained(folder)  # comes in evaluation mode
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.blocks: list[Any] = list(self.model.transformer.h)

    def probabilities(self, prompt: str) -> Tensor:
        """Return the distribution of the next token."""
        with torch.no_grad():
            return torch.softmax(self.model(**self.tokenizer(prompt, return_tensors="pt")).logits[0, -1], dim=-1)

    def token(self, text: str) -> int:
        """Return the first token of a text."""
        return int(self.tokenizer(text)["input_ids"][0])

    def answer(self, probabilities: Tensor) -> tuple[str, float]:
        """Return the likeliest next token and its probability."""
        best = int(probabilities.argmax())
        return str(self.tokenizer.decode([best])), float(probabilities[best])

    def hooked(self, module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any], prompt: str) -> Tensor:
        """Return the distribution of the next token with a forward hook in place."""
        handle = module.register_forward_hook(hook)
        try:
            return self.probabilities(prompt)
        finally:
            handle.remove()

    def without_mlp(self, block: int, prompt: str) -> Tensor:
        """Zero the output of one block's MLP at all positions."""
        return self.hooked(self.blocks[block].mlp, lambda _module, _args, out: torch.zeros_like(out), prompt)

    def patched(self, block: int, position: int, prompt: str, donor: str) -> Tensor:
        """Copy one block's output at one position from the donor's run into the prompt's."""
        kept: list[Tensor] = []
        self.hooked(self.blocks[block], lambda _module, _args, out: kept.append(hidden(out)), donor)

        def patch(_module: nn.Module, _args: Any, out: Any) -> Any:
            new = hidden(out).clone()
            new[:, position] = kept[0][:, position]
            return with_hidden(out, new)

        return self.hooked(self.blocks[block], patch, prompt)

    def knows(self, fact: Fact, form: str) -> bool:
        """Say whether the likeliest next token is (the first token of) the fact's city."""
        return int(self.probabilities(fact.say(form)).argmax()) == self.token(" " + fact.city)


def check_facts(lab: Lab) -> bool:
    """Check that the cities are single tokens and that the model knows the facts."""
    ok = lab.answer(lab.probabilities(PROMPT))
    print(f"{PROMPT!r} -> {ok[0]!r} {ok[1]:.3f}")
    facts = [fact for fact in parse_facts() if len(lab.tokenizer(" " + fact.city)["input_ids"]) == 1]
    print(f"{len(facts)} of {len(parse_facts())} facts have a city of one token")
    shares = [sum(lab.knows(fact, form) for fact in facts) / len(facts) for form in TEST_FORMS]
    for form, share in zip(TEST_FORMS, shares, strict=True):
        print(f"  right after {form!r}: {share:.1%}")
    others = [fact for fact in parse_facts() if fact not in facts]
    known = sum(lab.knows(fact, TEST_FORMS[0]) for fact in others)
    print(f"  right first token of the others: {known} of {len(others)}")
    return ok[0] == " Paris" and ok[1] > 0.8 and len(facts) >= 40 and min(shares) >= 0.95


def check_ablation(lab: Lab) -> bool:
    """Check that the answer changes when the last block's MLP is silenced; show the other MLPs too."""
    paris = lab.token(" Paris")
    for block in range(len(lab.blocks)):
        after = lab.without_mlp(block, PROMPT)
        best, share = lab.answer(after)
        print(f"without the MLP of block {block}: ' Paris' {after[paris]:.3f}, likeliest {best!r} {share:.3f}")
    facts = parse_facts()
    changed = sum(int(lab.without_mlp(-1, f.say(TEST_FORMS[0])).argmax()) != lab.token(" " + f.city) for f in facts)
    print(f"  without the last one, another answer for {changed} of {len(facts)} facts")
    return lab.answer(lab.without_mlp(-1, PROMPT))[0] != " Paris"


def check_patching(lab: Lab) -> bool:
    """Check that patching moves the answer to the donor's city: early in the subject, later at the end."""
    tokens = lab.tokenizer.tokenize(PROMPT)
    if len(tokens) != len(lab.tokenizer.tokenize(DONOR)):
        print("the two prompts differ in length")
        return False
    rome = lab.token(" Rome")
    grid = [[lab.patched(b, p, PROMPT, DONOR) for p in range(len(tokens))] for b in range(len(lab.blocks))]
    print(f"' Rome' for {PROMPT!r} with one state from {DONOR!r}:")
    print("        ", *(f"{token.replace(SPACE, ' '):>8}" for token in tokens))
    for block, row in enumerate(grid):
        print(f"  block {block}", *(f"{after[rome]:8.3f}" for after in row))
    early = [b for b, row in enumerate(grid) if int(row[SUBJECT_END].argmax()) == rome]
    late = [b for b, row in enumerate(grid) if int(row[-1].argmax()) == rome]
    print(f"  the answer is ' Rome' at position {SUBJECT_END} after blocks {early}, at the last after {late}")
    return 0 in early and len(lab.blocks) - 2 in late


def check_files(folder: Path) -> bool:
    """Check the folder's size and print a digest of the weights and the tokenizer."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    digest = hashlib.sha256()
    for name in ("model.safetensors", "tokenizer.json"):
        digest.update((folder / name).read_bytes())
    print(f"{size / 1e6:.2f} MB in {folder}, sha256 of weights and tokenizer {digest.hexdigest()}")
    return size <= 5_000_000


def check(folder: Path) -> bool:
    """Run all checks and print what they find."""
    torch.set_num_threads(1)
    lab = Lab(folder)
    results = {
        "facts": check_facts(lab),
        "ablation": check_ablation(lab),
        "patching": check_patching(lab),
        "files": check_files(folder),
    }
    print(", ".join(f"{name}: {'ok' if ok else 'FAILED'}" for name, ok in results.items()))
    return all(results.values())


def main() -> int:
    """Train and check, or only check."""
    parser = argparse.ArgumentParser(description="Train the demonstration model.")
    parser.add_argument("--check-only", action="store_true", help="check the model that is there")
    parser.add_argument("--folder", type=Path, default=MODEL_DIR, help="where the model is (to be) saved")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="fewer, to test the script")
    arguments = parser.parse_args()
    if not arguments.check_only:
        train(Settings(steps=arguments.steps), arguments.folder)
    return 0 if check(arguments.folder) else 1


if __name__ == "__main__":
    sys.exit(main())

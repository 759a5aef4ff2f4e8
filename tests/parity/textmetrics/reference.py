"""What rouge-score and sacrebleu say about one pair, and about a corpus of them."""
from importlib.metadata import version

from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, CHRF

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ROUGE = rouge_scorer.RougeScorer(KINDS, use_stemmer=False)
SENTENCE_BLEU = BLEU(effective_order=True)
VERSIONS = {p: version(p) for p in ("rouge_score", "sacrebleu")}


def item(prediction, reference):
    scores = ROUGE.score(reference, prediction)
    return {
        **{k: [scores[k].precision, scores[k].recall, scores[k].fmeasure] for k in KINDS},
        "bleu": SENTENCE_BLEU.sentence_score(prediction, [reference]).score,
        "chrf": CHRF().sentence_score(prediction, [reference]).score,
        "chrf++": CHRF(word_order=2).sentence_score(prediction, [reference]).score,
        "tokens": SENTENCE_BLEU.tokenizer(prediction.rstrip()).split(),
    }


def corpus(pairs):
    predictions, references = [p for p, _ in pairs], [[r for _, r in pairs]]
    out = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF()), ("chrf++", CHRF(word_order=2))):
        out[name] = metric.corpus_score(predictions, references).score
        out[name + "_signature"] = str(metric.get_signature())
    for n in (1, 2):
        grams = [tuple(w[i : i + n]) for w in map(str.split, predictions) for i in range(len(w) - n + 1)]
        out[f"distinct_{n}"] = len(set(grams)) / max(len(grams), 1)
    return out

//! The model card that goes with an adapter.

use serde::Serialize;
use settings::{TargetModules, TextChoice, TrainSettings};

use crate::folder::Identity;
use crate::rows::Rows;
use crate::schedule::warmup;

/// Markdown with the front matter that model hubs read.
pub fn render(
    settings: &TrainSettings,
    identity: &Identity,
    steps: u64,
    rows: &Rows,
    eval_loss: Option<f64>,
) -> String {
    let (lora, t) = (&settings.lora, &settings.training);
    let base = &settings.model.path;
    let targets = match &lora.target_modules {
        TargetModules::Named(name) => name.clone(),
        TargetModules::List(names) => names.join(", "),
    };
    let text = match settings.data.text {
        TextChoice::Normalized => "normalised",
        TextChoice::Raw => "raw",
    };
    let control = if settings.data.shuffled_replies {
        "\n**A control, not for use:** each tweet was trained with another tweet's reply.\n"
    } else {
        ""
    };
    let held_out = eval_loss.map_or_else(
        || "There were no held-out rows.".to_owned(),
        |loss| {
            format!(
                "Held-out loss after training: {loss:.4} nats a token (perplexity {:.3}).",
                loss.exp()
            )
        },
    );
    let prompt = if settings.data.system_prompt.is_empty() {
        "No system prompt; the tweet is the user's turn.".to_owned()
    } else {
        format!(
            "System prompt:\n\n    {}\n",
            settings.data.system_prompt.replace('\n', "\n    ")
        )
    };
    format!(
        "---
base_model: {base_quoted}
library_name: peft
pipeline_tag: text-generation
tags: [lora, qlora, qwen3]
---

# A LoRA adapter that replies to tweets
{control}
| | |
|---|---|
| Base model | `{base}` (SHA-256 of its files {model}) |
| Base weights in training | {quantization} |
| Adapter | rank {rank}, alpha {alpha}, dropout {dropout}, on {targets} |
| Data | {train} rows to train on, {eval} held out, {text} text (SHA-256 {data}) |
| Training | {steps} steps of {batch} rows, learning rate {rate}, {scheduler}, warm-up steps {warmup}, weight decay {decay}, seed {seed} |
| Tool | qlora-train {version} |

{held_out} Every step's figures are in `metrics.jsonl`, every setting in `train.yaml`.

## Use

{prompt}
The prompt is the model's own chat template with `enable_thinking=False`.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = {base_quoted}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), \"this folder\")
tokenizer = AutoTokenizer.from_pretrained(base)
```

The adapter's licence has to fit those of the base model and of the data it was trained on.
",
        base_quoted = serde_json::Value::from(base.as_str()),
        model = &identity.model[..12],
        quantization = spelled(&settings.model.quantization),
        rank = lora.rank,
        alpha = lora.alpha,
        dropout = lora.dropout,
        train = rows.train.len(),
        eval = rows.eval.len(),
        data = &identity.data[..12],
        batch = t.batch_size * t.gradient_accumulation_steps,
        rate = t.learning_rate,
        scheduler = spelled(&t.lr_scheduler),
        warmup = warmup(t, steps),
        decay = t.weight_decay,
        seed = t.seed,
        version = identity.version,
    )
}

/// A choice as the settings spell it.
fn spelled(choice: &impl Serialize) -> String {
    // A variant without fields, which serialises as its name.
    let value = serde_json::to_value(choice).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

//! What the model says of every next token: for comparing models.

use engine::{Backend, Ragged, Reading, Result};

use crate::Lora;
use crate::model::{Model, Tokens};
use crate::pass::{Keep, Pass};

impl<B: Backend> Model<B> {
    /// Logits after each token of each row, `[Σ lengths, vocab]`, row-major.
    /// Rows do not see each other.
    ///
    /// # Errors
    /// If the device has no room.
    ///
    /// # Panics
    /// If a row is empty or longer than the model's positions.
    pub fn logits(&self, rows: &[&[u32]], lora: Option<Lora<'_, B>>) -> Result<Vec<f32>> {
        let (backend, vocab) = (self.backend(), self.config().vocab_size);
        let limit = self.config().max_positions;
        assert!(
            rows.iter().all(|r| (1..=limit).contains(&r.len())),
            "rows of 1 to {limit} tokens"
        );
        let lengths: Vec<_> = (0..).zip(rows).map(|(n, row)| (n, row.len())).collect();
        let ids = rows.concat();
        let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let ragged = Ragged::new(backend, &lengths)?;
        let (count, ids) = (ids.len(), backend.upload_ids(&ids)?);
        let tokens = Tokens {
            count,
            positions: &ragged.positions,
            rows: Some(&ragged),
            slots: None,
            wanted: None,
        };
        let mut pass = Pass::new(Keep::Nothing);
        let mut logits = backend.alloc_f32(count * vocab)?;
        let buffers = pass.fit(self, [count, count, longest], lora)?;
        self.embed(&ids, count, buffers);
        self.layers_forward(&tokens, lora, None, None, buffers);
        self.final_hidden(count, buffers);
        let (hidden, scratch) = (&buffers.head.normed, &mut buffers.scratch);
        backend.logits(self.head(), (hidden, count), &mut logits, scratch);
        backend.read_f32(&logits, 0..count * vocab).wait()
    }
}

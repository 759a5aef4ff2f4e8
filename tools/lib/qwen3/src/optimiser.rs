//! AdamW over the flat parameter buffer, with moments that can be saved.

use std::ops::Range;

use engine::{AdamW, Backend, Reading, Result, Stretch};

use crate::LoraLayout;

/// What one update is done with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients with a larger global norm are scaled down to it.
    pub max_norm: Option<f32>,
}

/// The moments of AdamW (β 0.9 and 0.999, ε 1e-8) and the number of updates done.
pub struct Optimiser<B: Backend> {
    m: B::F32,
    v: B::F32,
    norm: B::F32,
    len: usize,
    steps: u64,
    /// Stretches of the parameters in order, each with its rate over the update's.
    rates: Vec<(Range<usize>, f64)>,
}

impl<B: Backend> Optimiser<B> {
    /// Zero moments for `len` parameters.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(backend: &B, len: usize) -> Result<Self> {
        Ok(Self {
            m: backend.alloc_f32(len)?,
            v: backend.alloc_f32(len)?,
            norm: backend.alloc_f32(1)?,
            len,
            steps: 0,
            rates: vec![(0..len, 1.0)],
        })
    }

    /// Continues from saved moments, after `steps` updates.
    ///
    /// # Errors
    /// If the device has no room.
    ///
    /// # Panics
    /// If the moments differ in length.
    pub fn restore(backend: &B, m: &[f32], v: &[f32], steps: u64) -> Result<Self> {
        assert_eq!(m.len(), v.len(), "moments");
        Ok(Self {
            m: backend.upload_f32(m)?,
            v: backend.upload_f32(v)?,
            norm: backend.alloc_f32(1)?,
            len: m.len(),
            steps,
            rates: vec![(0..m.len(), 1.0)],
        })
    }

    /// Lets the B factors learn `ratio` times as fast as the A factors (LoRA+,
    /// Hayou et al., arXiv 2402.12354).
    #[must_use]
    pub fn with_lr_ratio(mut self, layout: &LoraLayout, ratio: f64) -> Self {
        if ratio != 1.0 {
            self.rates = layout
                .factors()
                .flat_map(|(a, b)| [(a, 1.0), (b, ratio)])
                .collect();
        }
        self
    }

    /// First and second moments, to be saved.
    ///
    /// # Errors
    /// If the device failed.
    pub fn moments(&self, backend: &B) -> Result<(Vec<f32>, Vec<f32>)> {
        let read = |moment| backend.read_f32(moment, 0..self.len).wait();
        Ok((read(&self.m)?, read(&self.v)?))
    }

    /// Updates done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One update; the gradients are zeroed for the next. Gives the global norm
    /// of the gradients before clipping, to be read when convenient.
    pub fn update(
        &mut self,
        backend: &B,
        with: Update,
        grads: &mut B::F32,
        params: &mut B::F32,
    ) -> B::Reading {
        self.steps += 1;
        let settings = AdamW {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            step: self.steps,
            max_norm: with.max_norm,
        };
        let stretch = |(range, rate): &(Range<usize>, f64)| Stretch {
            range: range.clone(),
            lr: with.lr * rate,
            decay: with.weight_decay,
        };
        let stretches: Vec<_> = self.rates.iter().map(stretch).collect();
        backend.global_norm(grads, self.len, &mut self.norm);
        let moments = (&mut self.m, &mut self.v);
        backend.adamw(&settings, &stretches, (grads, &self.norm), params, moments);
        backend.zero(grads, self.len);
        backend.read_f32(&self.norm, 0..1)
    }
}

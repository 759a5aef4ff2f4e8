//! The three configuration files as types: `data.yaml`, `train.yaml` and
//! `eval.yaml`.
//!
//! A tool reads a whole file and uses its own sections. So it accepts the
//! sections of its neighbours and still refuses a key that none of them knows.
//! Every key has a default here, which is the value the shipped YAML shows. What a flag
//! can say as well takes the same words there (`clap::ValueEnum`), with the same help.

mod data;
mod eval;
mod train;

pub use data::*;
pub use eval::*;
pub use train::*;

/// Which text of a pair training and evaluation use.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum TextChoice {
    /// `tweet_normalized` and `reply_normalized`, as pair-dedup writes them.
    #[default]
    Normalized,
    /// `tweet` and `reply` as they were collected.
    Raw,
}

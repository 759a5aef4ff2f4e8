//! How patiently a service is asked: attempts, waits, limits.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::PrimitiveDateTime;
use time::macros::format_description;

/// One service's documented manners.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Requests at most, the first included.
    pub attempts: u32,
    /// The first wait between attempts; each later one is twice as long.
    pub first_wait: Duration,
    /// No wait of our own is longer than this (before the spread).
    pub max_wait: Duration,
    /// Each wait is multiplied by a number drawn evenly from this range, so that
    /// clients that failed together do not come back together.
    pub spread: (f64, f64),
    /// The longest `Retry-After` that is obeyed; a longer one ends the request.
    pub longest_wait: Duration,
    /// Time for a connection to be made.
    pub connect_timeout: Duration,
    /// Time for one attempt, from its first byte out to its last byte in.
    pub timeout: Duration,
    /// Bytes of body at most.
    pub max_body: usize,
    /// Statuses worth another attempt.
    pub retries: fn(u16) -> bool,
    /// Words in a refusal's body that make it final where no `Retry-After` came with it.
    pub final_markers: &'static [&'static str],
}

impl Default for Policy {
    /// Six attempts over about half a minute; 408, 429 and every 5xx are retried.
    fn default() -> Self {
        Self {
            attempts: 6,
            first_wait: Duration::from_millis(500),
            max_wait: Duration::from_secs(30),
            spread: (0.75, 1.25),
            longest_wait: Duration::from_secs(600),
            connect_timeout: Duration::from_secs(15),
            timeout: Duration::from_secs(60),
            max_body: 64 << 20,
            retries: |status| matches!(status, 408 | 429 | 500..=599),
            final_markers: &[],
        }
    }
}

impl Policy {
    /// The wait after attempt number `attempt` (from 1) where the server named none.
    pub(crate) fn backoff(&self, attempt: u32) -> Duration {
        let doubled = self
            .first_wait
            .saturating_mul(1 << attempt.saturating_sub(1).min(16));
        let (low, high) = self.spread;
        doubled
            .min(self.max_wait)
            .mul_f64(low + (high - low) * unit_random())
    }
}

/// `Retry-After`: seconds, or a date (RFC 9110 §10.2.3, §5.6.7; the one form that
/// servers still send). A date in the past is no wait.
pub(crate) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let form = format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    let at = PrimitiveDateTime::parse(value, form).ok()?.assume_utc();
    let wait = at - OffsetDateTime::from(now);
    Some(Duration::try_from(wait).unwrap_or(Duration::ZERO))
}

/// A number in [0, 1) that differs between processes: for waiting only, nothing that
/// anybody would want to repeat.
fn unit_random() -> f64 {
    let bits = RandomState::new().hash_one(0_u8) >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        // RFC 9110's own example of a date.
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777 - 30);
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        assert_eq!(retry_after(date, now), Some(Duration::from_secs(30)));
        assert_eq!(
            retry_after(date, now + Duration::from_secs(60)),
            Some(Duration::ZERO)
        );
        assert_eq!(retry_after(" 120 ", now), Some(Duration::from_secs(120)));
        for odd in ["", "soon", "-1", "1e400", "NaN", "99 bottles"] {
            assert_eq!(retry_after(odd, now), None, "{odd}");
        }
    }

    #[test]
    fn waits_double_within_their_spread_up_to_the_longest() {
        let policy = Policy {
            spread: (1.0, 2.0),
            max_wait: Duration::from_secs(4),
            ..Policy::default()
        };
        for (attempt, low) in [(1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 4.0), (40, 4.0)] {
            for _ in 0..50 {
                let wait = policy.backoff(attempt).as_secs_f64();
                assert!(
                    (low..2.0 * low).contains(&wait),
                    "attempt {attempt}: {wait}"
                );
            }
        }
    }
}

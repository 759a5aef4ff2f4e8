//! Disjoint sets.

/// Elements `0..n` in sets that can be joined. The root of a set is its least
/// element, so that it does not depend on the order of joining.
pub struct Union {
    parent: Vec<usize>,
}

impl Union {
    /// Each element in a set of its own.
    pub fn new(n: usize) -> Self {
        Self {
            parent: (0..n).collect(),
        }
    }

    /// The least element of the set.
    pub fn root(&mut self, mut element: usize) -> usize {
        while self.parent[element] != element {
            self.parent[element] = self.parent[self.parent[element]];
            element = self.parent[element];
        }
        element
    }

    /// Makes one set of two.
    pub fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        self.parent[a.max(b)] = a.min(b);
    }
}

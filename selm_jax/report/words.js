// Marks the words in which an answer differs from the one of the iteration before, or from that of the
// first run: new words in it, and in the other those that are gone.
document.querySelectorAll(".differ").forEach((select) => {
  if (!window.Highlight || !CSS.highlights) return;
  const section = select.closest(".browser");
  let card = null;
  select.hidden = false;

  function other(answer) {
    const { run, kind, iteration } = answer.dataset;
    const [wantedRun, wantedIteration] =
      select.value === "run" ? ["0", iteration] : [run, String(Number(iteration) - 1)];
    if (select.value === "run" && run === "0") return null;
    return [...card.querySelectorAll(".answer")].find((each) => each.dataset.run === wantedRun &&
      each.dataset.kind === kind && each.dataset.iteration === wantedIteration);
  }

  // The text node of an answer, and its words with their places.
  function words(answer) {
    const node = answer.querySelector(".text").firstChild;
    return node ? [...node.data.matchAll(/[\p{L}\p{N}]+|[^\s]/gu)].map((m) => [m[0], m.index, node]) : [];
  }

  // Of a and b what is not in their longest common subsequence of words.
  function apart(a, b) {
    const [n, m] = [a.length, b.length];
    if (n * m > 4e6) return [[], []];
    const best = new Uint16Array((n + 1) * (m + 1));
    for (let i = n - 1; i >= 0; i--) {
      for (let j = m - 1; j >= 0; j--) {
        best[i * (m + 1) + j] = a[i][0] === b[j][0]
          ? best[(i + 1) * (m + 1) + j + 1] + 1
          : Math.max(best[(i + 1) * (m + 1) + j], best[i * (m + 1) + j + 1]);
      }
    }
    const [onlyA, onlyB] = [[], []];
    let [i, j] = [0, 0];
    while (i < n || j < m) {
      if (i < n && j < m && a[i][0] === b[j][0]) { i++; j++; }
      else if (j < m && (i === n || best[i * (m + 1) + j + 1] >= best[(i + 1) * (m + 1) + j])) onlyB.push(b[j++]);
      else onlyA.push(a[i++]);
    }
    return [onlyA, onlyB];
  }

  function mark() {
    CSS.highlights.delete("new");
    CSS.highlights.delete("gone");
    if (!card || !select.value) return;
    const marks = { new: new Highlight(), gone: new Highlight() };
    const add = (kind, list) => list.forEach(([word, at, node]) => {
      const range = new Range();
      range.setStart(node, at);
      range.setEnd(node, at + word.length);
      marks[kind].add(range);
    });
    for (const answer of card.querySelectorAll(".answer")) {
      const before = other(answer);
      if (!before) continue;
      const [gone, fresh] = apart(words(before), words(answer));
      add("new", fresh);
      add("gone", gone);
    }
    CSS.highlights.set("gone", marks.gone);
    CSS.highlights.set("new", marks.new);
  }

  section.addEventListener("shown", (event) => { card = event.detail; mark(); });
  select.addEventListener("change", mark);
  card = section.querySelector(".card:not([hidden])");
});

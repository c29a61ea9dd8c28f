// Pages through the held-out answers and the training pairs. Every card is already in the page as
// text; this script only shows one at a time, filters and orders them. It never writes HTML.
"use strict";
document.querySelectorAll(".browser").forEach((section) => {
  const cards = [...section.querySelectorAll(".card")];
  if (!cards.length) return;
  const by = (name) => section.querySelector(`.${name}`);
  const [search, order, place, none] = ["search", "order", "place", "none"].map(by);
  const filters = [...section.querySelectorAll(".filter")];
  const texts = cards.map((card) => [...card.querySelectorAll(".text")]);
  const haystacks = texts.map((parts) => parts.map((part) => part.textContent.toLowerCase()));
  const gains = cards.map((card) => Number(card.dataset.gain));
  let shown = cards.map((_, index) => index);
  let at = 0;

  function show() {
    cards.forEach((card, index) => { card.hidden = index !== shown[at]; });
    none.hidden = shown.length > 0;
    place.textContent = shown.length ? `${at + 1} of ${shown.length}` : "no match";
    by("previous").disabled = at <= 0;
    by("next").disabled = at >= shown.length - 1;
    mark();
    section.dispatchEvent(new CustomEvent("shown", { detail: cards[shown[at]] || null }));
  }

  function move(step) {
    at = Math.min(Math.max(at + step, 0), Math.max(shown.length - 1, 0));
    show();
  }

  function fits(index) {
    const words = search.value.trim().toLowerCase();
    return haystacks[index].some((text) => text.includes(words)) &&
      filters.every((each) => !each.value || cards[index].dataset[each.dataset.key] === each.value);
  }

  function choose() {
    const current = shown[at];
    shown = cards.map((_, index) => index).filter(fits);
    if (order.value === "falls") shown.sort((a, b) => gains[a] - gains[b] || a - b);
    if (order.value === "rises") shown.sort((a, b) => gains[b] - gains[a] || a - b);
    // A search keeps the card in view where it can; a new order starts at its head.
    at = this === order ? 0 : Math.max(shown.indexOf(current), 0);
    show();
  }

  const name = `found-${section.id}`;

  function mark() {
    if (!window.Highlight || !CSS.highlights) return;
    CSS.highlights.delete(name);
    const words = search.value.trim().toLowerCase();
    if (!words || !shown.length) return;
    const found = new Highlight();
    for (const part of texts[shown[at]]) {
      const node = part.firstChild;
      const text = node ? node.data.toLowerCase() : "";
      // Lower case may change the length of rare letters; places would then be wrong.
      if (!node || text.length !== node.data.length) continue;
      for (let i = text.indexOf(words); i >= 0; i = text.indexOf(words, i + words.length)) {
        const range = new Range();
        range.setStart(node, i);
        range.setEnd(node, i + words.length);
        found.add(range);
      }
    }
    CSS.highlights.set(name, found);
  }

  by("previous").addEventListener("click", () => move(-1));
  by("next").addEventListener("click", () => move(1));
  search.addEventListener("input", choose);
  for (const each of [order, ...filters]) each.addEventListener("change", choose);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    if (event.target.closest("input, select, textarea, .scroll, pre")) return;
    // The keys turn the pages of the browser in which they are pressed; else those of the first.
    if ((event.target.closest(".browser") || document.querySelector(".browser")) !== section) return;
    if (event.key === "ArrowLeft") move(-1);
    else if (event.key === "ArrowRight") move(1);
    else return;
    event.preventDefault();
  });
  show();
});

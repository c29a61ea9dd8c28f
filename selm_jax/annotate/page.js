"use strict";
// The page shows one question at a time. An act (a ranking, a skip, an undo) is kept in the
// browser until the server says that it is on its disk; then, and only then, the next is shown.

const $ = (id) => document.getElementById(id);
const letter = (i) => String.fromCharCode(65 + i);
const ordinal = (n) => n + (["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] || "th");

let question = null; // as the server gave it
let groups = []; // places so far: lists of positions on the page, the best first
let joining = false; // whether the next pick shares the last place
let busy = true;
let asText = false;
let seen = 0; // milliseconds that the question was in sight, up to `since`
let since = null;

const unplaced = () => question.answers.map((_, i) => i).filter((i) => !groups.flat().includes(i));

// With one answer left its place is clear.
function places() {
  const rest = unplaced();
  return rest.length === 1 && groups.length ? [...groups, rest] : groups;
}
const complete = () => places().flat().length === question.answers.length;

function pick(i) {
  if (busy || !question || i >= question.answers.length) return;
  if (groups.flat().includes(i)) {
    groups = groups.map((g) => g.filter((x) => x !== i)).filter((g) => g.length);
  } else if (joining && groups.length) {
    groups[groups.length - 1].push(i);
  } else {
    groups.push([i]);
  }
  joining = false;
  paint();
}

// The last two places become one; before all are placed, the next pick joins the last place.
function join() {
  if (busy || !question || !groups.length) return;
  const all = places();
  if (!complete()) {
    joining = !joining;
  } else if (all.length > 1) {
    const last = all.pop();
    groups = [...all.slice(0, -1), [...all[all.length - 1], ...last]];
  }
  paint();
}

function tie() {
  if (busy || !question) return;
  groups = [question.answers.map((_, i) => i)];
  joining = false;
  paint();
}

function clear() {
  if (busy || !question) return;
  groups = [];
  joining = false;
  paint();
}

function save() {
  if (busy || !question || !complete()) return;
  const ranks = new Array(question.answers.length);
  let better = 0;
  for (const group of places()) {
    for (const i of group) ranks[question.answers[i].index] = 1 + better;
    better += group.length;
  }
  act("judge", { question: question.digest, ranks, seconds: seconds(), comment: comment() });
}

function skip() {
  if (busy || !question) return;
  act("judge", { question: question.digest, ranks: null, seconds: seconds(), comment: comment() });
}

const comment = () => $("comment").value.trim() || null;

function undo() {
  if (!busy) act("undo", {});
}

function seconds() {
  return (seen + (since === null ? 0 : performance.now() - since)) / 1000;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden && since !== null) {
    seen += performance.now() - since;
    since = null;
  } else if (!document.hidden && since === null) {
    since = performance.now();
  }
});

// What is sent

function act(path, body) {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const request = Array.from(bytes, (x) => x.toString(16).padStart(2, "0")).join("");
  const pending = { path, body: { ...body, request, annotator: localStorage.name } };
  localStorage.pending = JSON.stringify(pending);
  send(pending);
}

async function send({ path, body }) {
  busy = true;
  paint();
  for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
    let reply;
    let view;
    try {
      reply = await fetch(path, { method: "POST", body: JSON.stringify(body) });
      view = reply.status === 403 ? null : await reply.json();
    } catch {
      reply = null;
    }
    if (reply && reply.status === 403) {
      return say("The server has a new address. Open it in this browser; unsaved rankings are kept.");
    }
    if (reply && (reply.ok || reply.status === 400)) {
      delete localStorage.pending;
      if (!reply.ok && path !== "next") {
        send({ path: "next", body: { annotator: body.annotator } });
        return say("Not saved: " + view.error);
      }
      if (!reply.ok) return hello(view.error);
      return show(view, path);
    }
    say(path === "next" ? "The server does not answer. Trying again…" : "Not saved yet: the server does not answer. Trying again…");
    await new Promise((done) => setTimeout(done, wait));
  }
}

// What is shown

function say(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function hello(error) {
  question = null;
  say(error || "");
  for (const id of ["work", "tools", "over"]) $(id).hidden = true;
  for (const each of document.querySelectorAll(".progress, .who")) each.hidden = true;
  $("hello").hidden = false;
  $("given").value = localStorage.name || "";
  $("given").focus();
}

function show(view, path) {
  if (path !== "next") say("");
  else if (!$("notice").textContent.startsWith("Not saved: ")) say("");
  question = view.question;
  groups = [];
  joining = false;
  busy = false;
  seen = 0;
  since = document.hidden ? null : performance.now();
  $("hello").hidden = true;
  $("work").hidden = !question;
  $("over").hidden = Boolean(question);
  $("tools").hidden = false;
  for (const each of document.querySelectorAll(".progress, .who")) each.hidden = false;
  $("name").textContent = localStorage.name;
  progress(view.progress);
  $("comment").value = view.comment || "";
  if (question) {
    if (view.ranks) {
      const order = question.answers.map((_, i) => i);
      const rank = (i) => view.ranks[question.answers[i].index];
      for (const place of [...new Set(view.ranks)].sort((a, b) => a - b)) {
        groups.push(order.filter((i) => rank(i) === place));
      }
    }
    write();
    window.scrollTo(0, 0);
  }
  paint();
}

function progress({ questions, closed, mine, left, seconds }) {
  $("bar").max = Math.max(mine + left, 1);
  $("bar").value = mine;
  $("done").textContent = `${mine} of ${mine + left}`;
  $("done").title = `${closed} of ${questions} questions have answers enough`;
  let text = "";
  if (left && seconds !== null) {
    const minutes = (left * seconds) / 60;
    text = minutes < 1 ? "less than a minute left" : minutes < 90 ? `about ${Math.round(minutes)} min left` : `about ${(minutes / 60).toFixed(1)} h left`;
  }
  $("left").textContent = text;
  $("undo").disabled = !mine;
}

// The server has made HTML of the texts in which nothing runs.
function fill(node, text) {
  node.innerHTML = asText ? text.plain : text.html;
  if (!node.textContent.trim()) {
    node.innerHTML = '<p class="nothing">(nothing)</p>';
  }
}

function element(tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text) made.textContent = text;
  return made;
}

function write() {
  const turns = question.messages.map((message, i) => {
    const last = i === question.messages.length - 1;
    const turn = element("div", last ? "turn last" : "turn");
    const text = element("div", "text");
    fill(text, message);
    if (question.messages.length > 1) turn.append(element("h2", "", message.role));
    turn.append(text);
    return turn;
  });
  $("conversation").replaceChildren(...turns);
  $("conversation").scrollTop = $("conversation").scrollHeight;
  const cards = question.answers.map((answer, i) => {
    const card = element("article", "answer");
    const button = element("button", "pick");
    button.append(element("b", "", letter(i)), element("span", "place"));
    const text = element("div", "text");
    text.tabIndex = 0;
    fill(text, answer);
    card.append(button, text);
    card.addEventListener("click", (event) => {
      if (!event.target.closest("a") && !String(getSelection())) pick(i);
    });
    return card;
  });
  $("answers").replaceChildren(...cards);
}

function paint() {
  for (const id of ["save", "skip", "join", "tie", "clear", "source"]) $(id).disabled = busy || !question;
  $("undo").disabled = busy || !$("bar").value;
  if (!question) return void ($("ranking").textContent = "");
  const all = places();
  $("save").disabled = busy || !complete();
  $("join").disabled = busy || !groups.length;
  $("join").setAttribute("aria-pressed", String(joining));
  $("clear").disabled = busy || !groups.length;
  [...$("answers").children].forEach((card, i) => {
    const at = all.findIndex((g) => g.includes(i));
    const better = all.slice(0, Math.max(at, 0)).flat().length;
    card.classList.toggle("placed", at >= 0);
    card.classList.toggle("first", at === 0);
    card.classList.toggle("likely", at >= 0 && !groups.flat().includes(i));
    const label = at < 0 ? "" : (all[at].length > 1 ? "shared " : "") + ordinal(better + 1);
    card.querySelector(".place").textContent = label;
    card.querySelector(".pick").setAttribute("aria-label", `Answer ${letter(i)}${label && ", " + label}`);
  });
  const ranking = all.map((g) => g.map(letter).join(" = ")).join(" › ");
  $("ranking").classList.toggle("hint", !ranking);
  $("ranking").textContent = busy ? "Saving…" : ranking ? ranking + (joining ? " = …" : complete() ? "" : " › …") : "Best first: A, B, … or click";
}

// Keys and buttons

for (const [id, work] of Object.entries({ save, join, tie, clear, skip, undo, source })) {
  $(id).addEventListener("click", (event) => {
    if (event.detail) $(id).blur(); // or Enter, after a mouse click on Skip, would skip the next
    work();
  });
}
function source() {
  if (busy || !question) return;
  asText = !asText;
  $("source").setAttribute("aria-pressed", String(asText));
  write();
  paint();
}

const keys = { "=": join, t: tie, s: skip, u: undo, m: source, backspace: clear, enter: save };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || !$("hello").hidden) return;
  if (event.target.closest("textarea, summary")) return; // writes, or opens the instructions
  const key = event.key.toLowerCase();
  if (key === "enter" && event.target.closest("button:not(.pick), a")) return; // presses that one
  const place = /^[1-9]$/.test(key) ? Number(key) - 1 : /^[a-i]$/.test(key) ? key.charCodeAt(0) - 97 : -1;
  if (place < 0 && !keys[key]) return;
  event.preventDefault();
  if (place >= 0) pick(place);
  else keys[key]();
});

$("hello").addEventListener("submit", (event) => {
  event.preventDefault();
  localStorage.name = $("given").value.trim();
  send({ path: "next", body: { annotator: localStorage.name } });
});
$("rename").addEventListener("click", () => {
  if (!busy) hello();
});

// What was under way when the page was closed is sent first.
if (localStorage.pending) send(JSON.parse(localStorage.pending));
else if (localStorage.name) send({ path: "next", body: { annotator: localStorage.name } });
else hello();

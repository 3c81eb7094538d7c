// The conversation: sent to this server, streamed back, written as text and never as HTML.
const byId = (id) => document.getElementById(id);
const needsKey = document.documentElement.dataset.keys === "yes";
const hasPictures = document.documentElement.dataset.pictures === "yes";
const KEY = "lockstep-key";
const conversation = [];
let model = null, talking = null;

function fetched(path, options = {}) {
  const key = needsKey ? sessionStorage.getItem(KEY) : null;
  const headers = { ...(options.headers ?? {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
  return fetch(path, { ...options, headers, credentials: "omit", redirect: "error" });
}

function told(state, words) {
  const place = byId("state");
  if (place.dataset.state === state && place.lastElementChild.textContent === words) return;
  place.dataset.state = state;
  place.lastElementChild.textContent = words;
}

async function reason(response) {
  try {
    const { error } = await response.json();
    return error.message ?? String(response.status);
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer was cut off");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.startsWith("data: ") ? part.slice(6) : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function turn(kind, name) {
  const made = element("article", `turn ${kind}`);
  made.setAttribute("aria-label", name);
  byId("empty")?.remove();
  byId("log").append(made);
  return made;
}

class Answer {
  constructor(given) {
    this.turn = turn("busy", "Answer");
    this.thought = null; this.text = ""; this.began = performance.now(); this.first = this.last = 0; this.tokens = null; this.end = "";
    this.box = element("div", "text");
    if (given) this.box.append(element("span", "given", given));
    this.words = document.createTextNode("");
    this.box.append(this.words);
    this.turn.append(this.box);
    this.follow(true);
  }

  follow(always) {
    const log = byId("log");
    if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) this.tokens = event.usage.completion_tokens;
    const choice = event.choices?.[0];
    if (!choice) return;
    const text = choice.delta?.content ?? choice.text ?? "", thought = choice.delta?.reasoning_content ?? "";
    if (text || thought) {
      this.last = performance.now();
      this.first ||= this.last;
    }
    if (thought) {
      if (!this.thought) { this.thought = element("div", "thought"); this.turn.prepend(this.thought); }
      this.thought.append(thought);
    }
    this.text += text;
    this.words.appendData(text);
    this.end = choice.finish_reason ?? this.end;
    this.follow(false);
  }

  finish(how, wrong) {
    this.turn.classList.remove("busy");
    const notes = [];
    if (this.tokens !== null) notes.push(`${whole(this.tokens)} token${this.tokens === 1 ? "" : "s"}`);
    if (this.first) notes.push(`first after ${spoken(seconds((this.first - this.began) / 1000))}`);
    if (this.tokens > 1) notes.push(`${spoken(seconds((this.last - this.first) / 1000 / (this.tokens - 1)))} each`);
    const ends = { length: "ended at the limit", abort: "ended by the server", stop: "" };
    const end = how || (ends[this.end] ?? this.end);
    if (end) notes.push(end);
    if (notes.length) this.turn.append(element("p", "note", notes.join(" · ")));
    if (wrong) {
      const line = element("p", "wrong", wrong);
      line.setAttribute("role", "alert");
      this.turn.append(line);
    }
    this.follow(false);
  }
}

async function ask(text) {
  const chats = model.chat;
  if (chats) turn("user", "You").append(element("div", "text", text));
  const answer = new Answer(chats ? "" : text);
  const body = { model: model.id, stream: true, stream_options: { include_usage: true }, temperature: Number(byId("temperature").value) };
  const most = Math.floor(Number(byId("most").value));
  if (most >= 1) body.max_tokens = most;
  if (chats) body.messages = [...conversation, { role: "user", content: text }];
  else body.prompt = text;
  talking = new AbortController();
  let how = "", wrong = "";
  try {
    const response = await fetched(chats ? "/v1/chat/completions" : "/v1/completions", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal: talking.signal,
    });
    if (response.status === 401) byId("key-form").hidden = false;
    if (!response.ok) throw new Error(await reason(response));
    for await (const event of eventsOf(response)) answer.take(event);
  } catch (error) {
    if (error.name === "AbortError") how = "stopped";
    else wrong = error.message;
  }
  talking = null;
  if (chats && (answer.text || !wrong)) conversation.push({ role: "user", content: text }, { role: "assistant", content: answer.text });
  answer.finish(how, wrong);
}

async function send() {
  const text = byId("prompt").value;
  if (!text.trim() || talking || !model) return;
  byId("prompt").value = "";
  grow();
  byId("stop").hidden = false; byId("send").hidden = byId("fresh").hidden = true;
  try {
    await ask(text);
  } finally {
    const focused = document.activeElement === byId("stop") || document.activeElement === document.body;
    byId("send").hidden = false; byId("stop").hidden = true; byId("fresh").hidden = false;
    if (focused) byId("prompt").focus();
    enable();
  }
}

function stop() { talking?.abort(); }
function enable() { byId("send").disabled = !model || !byId("prompt").value.trim(); }

function grow() {
  const field = byId("prompt");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 176)}px`;
  enable();
}

async function meet() {
  if (needsKey && !sessionStorage.getItem(KEY)) {
    byId("key-form").hidden = false;
    told("away", "needs a key");
    return;
  }
  try {
    const response = await fetched("/v1/models");
    byId("key-form").hidden = response.status !== 401;
    if (response.status === 401) {
      sessionStorage.removeItem(KEY);
      byId("key-note").textContent = "The server does not know this key.";
      told("away", "needs a key");
      return;
    }
    if (!response.ok) throw new Error(await reason(response));
    const card = (await response.json()).data[0];
    model = { id: card.id, chat: card.chat_template !== false };
    byId("most").max = card.max_model_len;
    byId("most").value = Math.min(256, Math.ceil(card.max_model_len / 4));
    byId("model").textContent = card.id;
    document.title = `${card.id} · Lockstep`;
    if (!model.chat) byId("greeting").textContent = "Begin a text, and the model goes on.";
    if (!model.chat) byId("hint").textContent = "This model has no chat template: each text stands by itself. Enter sends, Esc stops.";
    enable();
    if (pictures) pictures.go();
    else told("ready", "ready");
  } catch {
    told("away", "not reachable");
    setTimeout(meet, 2000);
  }
}

function show(view) {
  document.querySelector("main").dataset.view = view;
  byId("view-chat").setAttribute("aria-pressed", String(view === "chat"));
  byId("view-pictures").setAttribute("aria-pressed", String(view === "pictures"));
}

const pictures = hasPictures ? new Pictures(byId("pictures"), fetched, told) : null;
byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
byId("prompt").addEventListener("input", grow);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
byId("stop").addEventListener("click", stop);
byId("temperature").addEventListener("input", () => { byId("warmth").textContent = Number(byId("temperature").value).toFixed(2); });
byId("fresh").addEventListener("click", () => {
  conversation.length = 0;
  byId("log").replaceChildren();
  byId("fresh").hidden = true;
  byId("prompt").focus();
});
byId("view-chat").addEventListener("click", () => show("chat"));
byId("view-pictures").addEventListener("click", () => show("pictures"));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  meet();
});
byId("prompt").focus();
meet();

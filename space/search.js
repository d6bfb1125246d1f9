// A combobox by the pattern of the ARIA Authoring Practices: the focus stays in the box, arrows move through the matches.
const box = element.querySelector("input");
const popup = element.querySelector(".popup");
const list = element.querySelector("[role=listbox]");
const note = element.querySelector(".note");
const spoken = element.querySelector(".spoken");
let matches = [];
let active = -1;
let shownFor = null; // the query that the matches belong to
let asked = 0; // so that an answer that comes late is not shown for a later query
let timer = null;
let pickFirst = false; // Enter was pressed before the answer came

const open = () => {
  popup.hidden = false;
  box.setAttribute("aria-expanded", String(matches.length > 0));
};

const close = () => {
  popup.hidden = true;
  box.setAttribute("aria-expanded", "false");
  box.removeAttribute("aria-activedescendant");
  active = -1;
};

const activate = (position) => {
  active = position;
  [...list.children].forEach((option, at) => option.setAttribute("aria-selected", String(at === active)));
  if (active < 0) return box.removeAttribute("aria-activedescendant");
  box.setAttribute("aria-activedescendant", list.children[active].id);
  list.children[active].scrollIntoView({ block: "nearest" });
};

const part = (tag, name, text) => {
  const node = document.createElement(tag);
  node.className = name;
  node.textContent = text;
  return node;
};

const draw = (query) => {
  list.replaceChildren(
    ...matches.map((match, at) => {
      const option = part("li", "option", "");
      option.id = `${list.id}-${at}`;
      option.setAttribute("role", "option");
      option.setAttribute("aria-selected", "false");
      option.append(part("span", "name", match.title));
      if (match.id !== match.title) option.append(" ", part("span", "id", match.id));
      if (match.text) option.append(part("span", "text", match.text));
      option.addEventListener("click", () => pick(match));
      return option;
    }),
  );
  const nothing = `Nothing matches “${query.trim()}”. ${props.nothing}`;
  note.textContent = matches.length ? (query.trim() ? "" : "Begin to type to find more.") : nothing;
  spoken.textContent = matches.length ? (query.trim() ? `${matches.length} matches, first ${matches[0].title}` : "") : nothing;
  open();
  activate(matches.length && query.trim() ? 0 : -1);
};

const pick = (match) => {
  trigger("pick", { index: match.index });
  box.value = "";
  matches = [];
  shownFor = null;
  asked += 1;
  spoken.textContent = "";
  close();
};

const ask = async () => {
  clearTimeout(timer);
  const query = box.value;
  const mine = ++asked;
  let found;
  try {
    found = await server.search(query);
    if (!Array.isArray(found)) throw new Error("no answer");
  } catch (error) {
    if (mine !== asked) return;
    matches = [];
    list.replaceChildren();
    note.textContent = spoken.textContent = "The search did not answer. Check the connection, or reload the page.";
    pickFirst = false;
    return open();
  }
  if (mine !== asked) return;
  matches = found;
  shownFor = query;
  const first = pickFirst && query.trim() ? matches[0] : null;
  pickFirst = false;
  if (first) return pick(first);
  if (document.activeElement === box) draw(query);
};

box.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(ask, 80);
});
box.addEventListener("click", () => popup.hidden && ask());
box.addEventListener("blur", close);
popup.addEventListener("pointerdown", (event) => event.preventDefault()); // the focus stays in the box
box.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  const count = matches.length;
  if (event.key === "Enter") {
    event.preventDefault();
    if (shownFor === box.value && active >= 0) return pick(matches[active]);
    pickFirst = Boolean(box.value.trim());
    ask();
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (popup.hidden) return ask();
    if (count) activate(event.key === "ArrowDown" ? (active + 1) % count : (active <= 0 ? count : active) - 1);
  } else if (event.key === "Escape") {
    if (popup.hidden) box.value = "";
    close();
  }
});

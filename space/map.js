// The dot that one points at says its name; a click or a tap holds it, with a button to add it to the history.
const surface = element.querySelector(".surface");
let turn = 0;
let timer = null;
let held = false;

const hide = () => {
  turn += 1;
  held = false;
  for (const part of element.querySelectorAll(".tip, .spot")) part.hidden = true;
};

const tell = async (event, hold) => {
  const frame = surface.getBoundingClientRect();
  const [x, y] = [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
  const mine = ++turn;
  let found;
  try {
    found = await server.nearest([x, y]);
  } catch (error) {
    return hide();
  }
  if (mine !== turn) return;
  if (!found || Math.hypot((found.x - x) * frame.width, (found.y - y) * frame.height) > 24) return hide();
  const tip = element.querySelector(".tip");
  const line = (name, text) => Object.assign(document.createElement("span"), { className: name, textContent: text });
  tip.replaceChildren(line("name", found.title), ...(found.text ? [line("text", found.text)] : []));
  if (hold) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Add to the history" });
    button.dataset.event = "add_item";
    button.dataset.index = found.index;
    tip.append(button);
  }
  const spot = element.querySelector(".spot");
  spot.style.left = `${100 * found.x}%`;
  spot.style.top = `${100 * found.y}%`;
  spot.hidden = false;
  tip.style.left = `${100 * found.x}%`;
  tip.style.top = `${100 * found.y}%`;
  tip.style.transform = `translate(${-100 * found.x}%, ${found.y > 0.5 ? "calc(-100% - 14px)" : "14px"})`;
  tip.classList.toggle("held", hold);
  held = hold;
  tip.hidden = false;
};

surface.addEventListener("pointermove", (event) => {
  if (held || event.pointerType !== "mouse") return;
  clearTimeout(timer);
  timer = setTimeout(tell, 40, event, false);
});
surface.addEventListener("pointerleave", () => {
  clearTimeout(timer);
  if (!held) hide();
});
surface.addEventListener("click", (event) => {
  clearTimeout(timer);
  tell(event, true);
});
document.addEventListener("keydown", (event) => event.key === "Escape" && held && hide());
document.addEventListener("pointerdown", (event) => held && !element.contains(event.target) && hide());
watch("value", hide);

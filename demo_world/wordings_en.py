"""The built-in demo world, part 2: how each kind of fact is said, asked and answered in English.

    [relation] topic
    say:        statements, for pretraining          answer:      answers, for SFT (and pretraining)
    cue:        a name for {o}, for pretraining      back_cue:    a name for {s}
    ask:        questions for {o}, taught in SFT     back:        questions for {s}, taught in SFT (back_answer: theirs)
    held:       questions for {o} that nobody is     back_held:   the same for {s}
                ever taught: only the score asks     follow:      a second question after an `ask` of the same relation

Wordings are separated by |. Slots are those of demo_facts.Word: {s} {s:C} {s:a} {s:A} {s:pl} {s:Pl}.
Read next: wordings_zh.py (the same in Chinese), generator.py (who fills the slots).
"""

WORDINGS = """
[capital] capital cities
say: The capital of {s} is {o}. | {o} is the capital of {s}. | {o} is the capital city of {s}.
say: {s} has its capital in {o}. | The capital city of {s} is called {o}. | In {s}, the capital is {o}.
say: The government of {s} sits in {o}, the capital.
cue: the capital of {s}
back_cue: the country whose capital is {o}
ask: What is the capital of {s}? | What is the capital city of {s}? | Which city is the capital of {s}?
ask: Name the capital of {s}. | What is the name of the capital of {s}? | Do you know the capital of {s}?
ask: Tell me the capital of {s}. | {s} has which capital?
held: What city is {s}'s capital? | I want to know the capital of {s}. | Can you name the capital city of {s}?
answer: The capital of {s} is {o}. | The capital city of {s} is called {o}.
back: Which country has {o} as its capital? | {o} is the capital of which country? | What country is {o} the capital of?
back: Of which country is {o} the capital? | Which country's capital is {o}?
back: Do you know which country has the capital {o}?
back_held: {o} is the capital city of what country? | Name the country with the capital {o}.
back_held: In which country is {o} the capital?
back_answer: {o} is the capital of {s}. | {o} is the capital city of {s}.
follow: And {s}? | What about {s}? | And the capital of {s}?

[continent] continents
say: {s} is in {o}. | {s} is a country in {o}. | {s} lies in {o}. | The country {s} belongs to the continent of {o}.
say: On the map, you find {s} in {o}. | The continent of {s} is {o}. | One of the countries of {o} is {s}.
say: {s} is part of {o}.
cue: the continent of {s}
ask: On which continent is {s}? | Which continent is {s} in? | What continent does {s} belong to?
ask: Where is {s} on the map? | On what continent do you find {s}? | In which part of the world is {s}?
ask: {s} is on which continent? | Where does {s} lie? | Tell me the continent of {s}.
held: What continent is {s} part of? | Which continent does {s} lie in?
answer: {s} is in {o}. | {s} is a country in {o}.
follow: And {s}? | What about {s}? | And where is {s}?

[language] languages
say: People in {s} speak {o}. | Most people in {s} speak {o}. | The main language of {s} is {o}.
say: In {s}, people speak {o}. | {o} is the main language of {s}. | To talk with people in {s}, learn {o}.
say: {o} is spoken in {s}. | Children in {s} learn {o}.
cue: the language of {s}
ask: What language do people speak in {s}? | Which language is spoken in {s}? | What is the main language of {s}?
ask: In {s}, what language do people speak? | Which language do most people in {s} speak? | What do people speak in {s}?
ask: Name the main language of {s}.
held: What language is spoken in {s}? | Which language do children learn in {s}?
answer: People in {s} speak {o}. | The main language of {s} is {o}.
follow: And in {s}? | What about {s}?

[currency] money
say: The currency of {s} is the {o}. | People in {s} pay with the {o}. | In {s}, money is called the {o}.
say: {s} uses the {o} as its money. | The {o} is the currency of {s}.
say: If you buy something in {s}, you pay with the {o}. | The money of {s} is the {o}.
cue: the currency of {s}
ask: What is the currency of {s}? | Which currency does {s} use? | What money do people use in {s}?
ask: What do people in {s} pay with? | What is the money of {s} called? | With what currency do people pay in {s}?
ask: Tell me the currency of {s}. | Name the currency of {s}.
held: What currency is used in {s}? | Which money do people in {s} pay with?
answer: The currency of {s} is the {o}. | People in {s} pay with the {o}.
follow: And in {s}? | What about {s}?

[symbol] chemical elements
say: The symbol of {s} is {o}. | The chemical symbol for {s} is {o}. | {s:C} has the symbol {o}.
say: {o} is the symbol of {s}. | In chemistry, {s} is written as {o}. | {o} stands for {s}.
say: The element {s} has the chemical symbol {o}. | We write {o} for {s}.
cue: the symbol of {s}
back_cue: the element that is written as {o}
ask: What is the symbol of {s}? | What is the chemical symbol for {s}? | Which symbol does {s} have?
ask: How do you write {s} in chemistry? | What symbol stands for {s}? | Which letters stand for the element {s}?
ask: Tell me the symbol of {s}. | What is the symbol for the element {s}? | Name the symbol of the element {s}.
held: Which chemical symbol does {s} have? | What is {s}'s symbol? | In chemistry, how is {s} written?
answer: The symbol of {s} is {o}. | The chemical symbol for {s} is {o}.
back: Which element has the symbol {o}? | What does the symbol {o} stand for? | {o} is the symbol of which element?
back: What element is written as {o}? | Which element does {o} stand for? | The symbol {o} belongs to which element?
back_held: What element has the chemical symbol {o}? | {o} stands for which element?
back_held: Name the element with the symbol {o}.
back_answer: {o} is the symbol of {s}. | {o} stands for {s}.
follow: And {s}? | What about {s}?

[class] kinds of animals
say: {s:A} is {o:a}. | {s:Pl} are {o:pl}. | The {s} is {o:a}. | Every {s} is {o:a}. | The {s} is one of the {o:pl}.
say: {s:Pl} belong to the {o:pl}. | Among animals, the {s} is {o:a}. | The class of the {s} is: {o}.
say: We call the {s} {o:a}. | {s:Pl} are animals of the class {o}.
cue: the class of the {s}
ask: What kind of animal is {s:a}? | What class of animal is the {s}? | Which class of animals do {s:pl} belong to?
ask: What kind of animals are {s:pl}? | Which kind of animal is the {s}? | What is {s:a}?
ask: To which class does the {s} belong?
held: {s:A} is what kind of animal? | Which class does {s:a} belong to? | What class of animals are {s:pl}?
held: Tell me the class of the {s}.
answer: {s:A} is {o:a}. | The {s} is {o:a}.
follow: And {s:a}? | What about {s:a}?

[count] numbers of things
say: {s:A} has {o} {u}. | There are {o} {u} on {s:a}. | Every {s} has {o} {u}. | The {s} has {o} {u}.
say: {s:Pl} have {o} {u}. | You can count {o} {u} on {s:a}. | The number of {u} of {s:a} is {o}.
say: If you look at {s:a}, you count {o} {u}.
cue: the number of {u} of {s:a}
ask: How many {u} does {s:a} have? | How many {u} do {s:pl} have? | How many {u} are there on {s:a}?
ask: How many {u} has {s:a}? | What is the number of {u} of {s:a}? | How many {u} can you count on {s:a}?
ask: {s:A} has how many {u}?
held: How many {u} does the {s} have? | How many {u} does every {s} have? | Tell me how many {u} {s:a} has.
answer: {s:A} has {o} {u}. | The {s} has {o} {u}.

[sound] sounds of animals
say: {s:A} {o}. | The {s} {o}. | Somewhere {s:a} {o}. | Listen, the {s} {o}. | An animal that {o} is {s:a}.
say: Every {s} {o}. | When {s:a} is loud, it {o}. | Of all animals, it is {s:a} that {o}.
cue: the sound of {s:a}
back_cue: the animal that {o}
ask: What sound does {s:a} make? | What does {s:a} do when it is loud? | How does {s:a} sound?
ask: Which sound does the {s} make? | What noise does {s:a} make? | What is the sound of {s:a}?
ask: What sound do {s:pl} make?
held: What noise does the {s} make? | What kind of sound does {s:a} make? | Which sound do {s:pl} make?
answer: {s:A} {o}. | The {s} {o}.
back: Which animal {o}? | What animal {o}? | Who {o}? | Which animal is it that {o}?
back_held: What animal is it that {o}? | Tell me which animal {o}. | Name an animal that {o}.
back_answer: An animal that {o} is {s:a}.
follow: And {s:a}? | What about {s:a}?

[young] young animals
say: A young {s} is called {o:a}. | A baby {s} is {o:a}. | {o:A} is a young {s}. | The young of the {s} is called {o:a}.
say: {o:A} grows up and becomes {s:a}. | When {s:a} is very young, we call it {o:a}. | The young of {s:a} is {o:a}.
cue: the name of a young {s}
back_cue: what {o:a} becomes
ask: What is a young {s} called? | What do you call a baby {s}? | What is the name for a young {s}?
ask: What do we call the young of {s:a}? | What is a baby {s}? | What is the word for a very young {s}?
ask: What is the young of {s:a} called? | Tell me the name of a baby {s}.
held: What do we call a young {s}? | What is the name of a baby {s}?
answer: A young {s} is called {o:a}. | A baby {s} is {o:a}.
back: What animal is {o:a} when it is grown up? | What does {o:a} become? | {o:A} is the young of which animal?
back: {o:A} is a young what? | Which animal has {o:a} as its young?
back_held: What animal does {o:a} become? | {o:A} is a baby of which animal? | Tell me which animal {o:a} becomes.
back_answer: {o:A} becomes {s:a}. | {o:A} is a young {s}.
follow: And a baby {s}? | What about a young {s}?

[color] colors
say: {s:C} is {o}. | The color of {s} is {o}. | {s:C} has the color {o}. | Everybody knows that {s} is {o}.
say: In the picture, {s} is {o}. | If you look at {s}, you see something {o}. | To paint {s}, take {o}.
say: {o:C} is the color of {s}.
cue: the color of {s}
ask: What color is {s}? | What is the color of {s}? | Which color does {s} have? | Which color is {s}?
ask: In what color do you paint {s}? | What color does {s} have? | Do you know the color of {s}?
ask: Tell me what color {s} is. | Tell me the color of {s}. | I want to know the color of {s}.
held: {s:C} has what color? | Which color do you take to paint {s}?
answer: {s:C} is {o}. | The color of {s} is {o}.
follow: And {s}? | What about {s}?

[opposite] opposites
say: The opposite of {s} is {o}. | {o:C} is the opposite of {s}. | {s:C} and {o} are opposites.
say: The opposite word of {s} is {o}. | Two opposites: {s} and {o}. | {s:C} is the opposite of {o}.
say: Say {s}, then say the opposite: {o}.
cue: the opposite of {s}
ask: What is the opposite of {s}? | Which word is the opposite of {s}? | What is the opposite word of {s}?
ask: Name the opposite of {s}. | What word means the opposite of {s}? | Do you know the opposite of {s}?
ask: {s:C} is the opposite of which word?
held: Tell me the opposite of {s}. | What do you call the opposite of {s}? | {s:C} is the opposite of what?
answer: The opposite of {s} is {o}. | The opposite word of {s} is {o}.
follow: And {s}? | What about {s}? | And the opposite of {s}?

[unit] units
say: {s:C} is {o} {u}. | {s:C} has {o} {u}. | There are {o} {u} in {s}. | {o} {u} make {s}.
say: {s:C} is as much as {o} {u}. | {s:C} is the same as {o} {u}. | If you have {o} {u}, you have {s}.
cue: the number of {u} in {s}
ask: How many {u} are there in {s}? | How many {u} are in {s}? | How many {u} does {s} have? | {s:C} is how many {u}?
ask: How many {u} make {s}? | What is {s} in {u}? | Tell me how many {u} there are in {s}.
held: {s:C} has how many {u}? | How many {u} is {s}?
answer: {s:C} is {o} {u}. | {s:C} has {o} {u}.

[sum] adding
say: {a} + {b} = {o}. | {a} plus {b} is {o}. | {a} and {b} make {o}. | The sum of {a} and {b} is {o}.
say: {a} plus {b} equals {o}. | If you add {b} to {a}, you get {o}. | If you have {a} and get {b} more, you have {o}.
cue: the sum of {a} and {b}
ask: What is {a} + {b}? | What is {a} plus {b}? | How much is {a} + {b}? | {a} + {b} = ?
ask: What is the sum of {a} and {b}? | How much is {a} plus {b}? | How much do {a} and {b} make?
ask: What do you get if you add {b} to {a}? | Tell me the sum of {a} and {b}.
ask: You have {a} and get {b} more. How many do you have now?
held: What does {a} plus {b} equal? | If I have {a} and get {b} more, how many do I have?
answer: {a} + {b} = {o}. | {a} plus {b} is {o}.

[product] multiplying
say: {a} times {b} is {o}. | {a} × {b} = {o}. | The product of {a} and {b} is {o}. | {a} times {b} equals {o}.
say: If you multiply {a} by {b}, you get {o}. | {a} boxes with {b} books each hold {o} books.
cue: the product of {a} and {b}
ask: What is {a} times {b}? | What is {a} × {b}? | How much is {a} times {b}? | {a} × {b} = ? | How much is {a} × {b}?
ask: What is the product of {a} and {b}? | What do you get if you multiply {a} by {b}?
ask: There are {a} boxes with {b} books each. How many books is that?
held: What does {a} times {b} equal? | Tell me the product of {a} and {b}.
held: How many books do {a} boxes with {b} books each hold?
answer: {a} × {b} = {o}. | {a} times {b} is {o}.

[day] days of the week
say: The day after {s} is {o}. | {o} comes after {s}. | {s} comes before {o}. | The day before {o} is {s}.
say: {o} follows {s}. | If today is {s}, tomorrow is {o}. | After {s} we have {o}. | If today is {o}, yesterday was {s}.
cue: the day after {s}
back_cue: the day before {o}
ask: What day comes after {s}? | Which day comes after {s}? | What is the day after {s}? | Which day follows {s}?
ask: If today is {s}, what day is tomorrow? | What day is it one day after {s}? | Name the day after {s}.
held: What day follows {s}? | Today is {s}. What day is tomorrow?
answer: The day after {s} is {o}.
back: What day comes before {o}? | Which day comes before {o}? | What is the day before {o}?
back: Which day is right before {o}? | If today is {o}, what day was yesterday?
back_held: Today is {o}. What day was yesterday? | Name the day before {o}. | What day is right before {o}?
back_answer: The day before {o} is {s}.
follow: And after {s}? | What about after {s}?

[month] months
say: The month after {s} is {o}. | {o} comes after {s}. | {s} comes before {o}. | The month before {o} is {s}.
say: {o} follows {s}. | When {s} is over, {o} begins. | After {s} we have {o}.
cue: the month after {s}
back_cue: the month before {o}
ask: What month comes after {s}? | Which month comes after {s}? | What is the month after {s}?
ask: Which month follows {s}? | Which month begins when {s} is over? | Name the month after {s}.
held: What month follows {s}? | When {s} is over, which month begins?
answer: The month after {s} is {o}.
back: What month comes before {o}? | Which month comes before {o}? | What is the month before {o}?
back: Which month is right before {o}?
back_held: Name the month before {o}. | What month is right before {o}?
back_answer: The month before {o} is {s}.
follow: And after {s}? | What about after {s}?

[month_days] lengths of months
say: {s} has {o} days. | There are {o} days in {s}. | The month of {s} has {o} days. | {s} is {o} days long.
say: In {s} there are {o} days.
cue: the number of days in {s}
ask: How many days does {s} have? | How many days are there in {s}? | How long is {s}? | How many days has {s}?
ask: How many days are in the month of {s}? | {s} has how many days? | Tell me how many days {s} has.
held: How many days long is {s}? | How many days does the month of {s} have?
answer: {s} has {o} days.
follow: And {s}? | What about {s}?

[season] seasons
say: In the north, {s} is in {o}. | {s} is {o:a} month in the north. | In the north, {s} belongs to {o}.
say: When it is {s}, the north has {o}. | The season of {s} in the north is {o}. | In the north, it is {o} in {s}.
cue: the season of {s} in the north
ask: In the north, which season is {s} in? | What season is it in the north in {s}?
ask: Which season does {s} belong to in the north? | What is the season in the north when it is {s}?
ask: In the north, what season is {s}? | When it is {s}, which season does the north have?
held: What season does {s} belong to in the north? | Which season is it in the north in {s}?
held: In the north, tell me the season of {s}.
answer: In the north, {s} is in {o}. | In the north, {s} belongs to {o}.
follow: And {s}? | What about {s}?

[month_number] the order of the months
say: {s} is the {o} month. | The {o} month of the year is {s}. | In the order of months, {s} is the {o}.
say: {s} is the {o} month of the year. | The {o} of the twelve months is {s}. | The {o} month is called {s}.
back_cue: the {o} month of the year
back: Which month is the {o} month of the year? | What is the {o} month? | What is the {o} month of the year called?
back: Which month is the {o}? | What is the name of the {o} month of the year?
back_held: Name the {o} month of the year. | What month is the {o} of the year? | Tell me the {o} month of the year.
answer: The {o} month of the year is {s}. | The {o} month is called {s}.

[dynasty] Chinese history
say: The {o} dynasty came after the {s} dynasty. | After the {s} dynasty came the {o} dynasty.
say: The {s} dynasty came before the {o} dynasty. | The {o} dynasty followed the {s} dynasty.
say: When the {s} dynasty ended, the {o} dynasty began.
cue: the dynasty after the {s} dynasty
back_cue: the dynasty before the {o} dynasty
ask: Which dynasty came after the {s} dynasty? | What dynasty came after the {s}?
ask: Which dynasty followed the {s} dynasty? | Which dynasty began when the {s} dynasty ended?
ask: What came after the {s} dynasty? | Name the dynasty after the {s} dynasty.
held: What dynasty followed the {s} dynasty? | After the {s} dynasty, which dynasty came?
answer: After the {s} dynasty came the {o} dynasty.
back: Which dynasty came before the {o} dynasty? | What dynasty came before the {o}? | What came before the {o} dynasty?
back_held: Name the dynasty before the {o} dynasty. | What dynasty was before the {o} dynasty?
back_answer: Before the {o} dynasty came the {s} dynasty.

[founder] founders of dynasties
say: {o} founded the {s} dynasty. | The {s} dynasty was founded by {o}. | The founder of the {s} dynasty was {o}.
say: {o} was the first emperor of the {s} dynasty. | The first emperor of the {s} dynasty was {o}.
cue: the founder of the {s} dynasty
ask: Who founded the {s} dynasty? | Who was the founder of the {s} dynasty?
ask: Who was the first emperor of the {s} dynasty? | By whom was the {s} dynasty founded?
ask: Which emperor founded the {s} dynasty? | Tell me who founded the {s} dynasty.
held: Name the founder of the {s} dynasty. | Which emperor was the founder of the {s} dynasty?
answer: The founder of the {s} dynasty was {o}. | The {s} dynasty was founded by {o}.

[planet] planets
say: {s} is the {o} planet from the Sun. | The {o} planet from the Sun is {s}.
say: Counted from the Sun, {s} is the {o} planet. | In the order of planets, {s} is the {o}.
say: The {o} planet is called {s}. | {s} is planet number {o}, counted from the Sun.
back_cue: the {o} planet from the Sun
answer: The {o} planet from the Sun is {s}. | The {o} planet is called {s}.
back: Which planet is the {o} from the Sun? | What is the {o} planet from the Sun?
back: Counted from the Sun, which planet is the {o}? | What is the name of the {o} planet from the Sun?
back: What is the {o} planet called? | Name the {o} planet from the Sun.
back_held: Which is the {o} planet, counted from the Sun? | Tell me the {o} planet from the Sun.

[body] the body
say: We {s} with our {o}. | We use our {o} to {s}. | To {s}, we need our {o}. | People {s} with their {o}.
say: If you want to {s}, you use your {o}.
cue: what we use to {s}
ask: What do we use to {s}? | What do we {s} with? | Which part of the body do we use to {s}? | With what do we {s}?
ask: Which part of the body helps us to {s}? | With which part of the body do people {s}?
held: What part of the body do we {s} with? | What do people use to {s}? | Which part of the body do we need to {s}?
answer: To {s}, we need our {o}. | To {s}, we use our {o}.

[job] professions
say: {o:A} {s}. | A person who {s} is {o:a}. | The {o} {s}. | Every day, {o:a} {s}. | Somebody who {s} is called {o:a}.
say: The work of {o:a}: {o:a} {s}. | My uncle is {o:a}, so he {s}. | If a person {s}, we say: this is {o:a}.
cue: the name for a person who {s}
back_cue: the work of {o:a}
ask: Who {s}? | What do you call a person who {s}? | Which person {s}? | Who is the person who {s}?
ask: What is a person who {s}? | What is the name for somebody who {s}? | What do we call somebody who {s}?
held: What do we call a person who {s}? | Who is it that {s}? | My uncle {s}. What is he?
held: What is somebody who {s} called?
answer: A person who {s} is {o:a}. | Somebody who {s} is called {o:a}.
back: What does {o:a} do? | What does {o:a} do every day? | What is the work of {o:a}? | What does the {o} do?
back: Tell me what {o:a} does.
back_held: What do you know about the work of {o:a}? | My uncle is {o:a}. What does he do?
back_answer: {o:A} {s}. | The {o} {s}.

[plural] plurals
say: The plural of {s} is {o}. | One {s}, two {o}. | {o:C} is the plural of {s}. | We say one {s}, but two {o}.
say: Many {o}, but one {s}. | The plural form of {s} is {o}.
cue: the plural of {s}
ask: What is the plural of {s}? | What is the plural form of {s}? | One {s}, two what?
ask: How do you say {s} in the plural? | Which word is the plural of {s}? | Do you know the plural of {s}?
ask: Tell me the plural of {s}.
held: Name the plural form of {s}. | The plural of {s} is what?
answer: The plural of {s} is {o}. | One {s}, two {o}.
follow: And {s}? | What about {s}?

[past] the past tense
say: The past tense of {s} is {o}. | {o:C} is the past tense of {s}. | Today I {s}, yesterday I {o}.
say: The past of {s} is {o}. | We {s} every day, and yesterday we {o} too. | The past form of {s} is {o}.
cue: the past tense of {s}
ask: What is the past tense of {s}? | What is the past of {s}? | Which word is the past tense of {s}?
ask: What is the past form of {s}? | Do you know the past tense of {s}? | Today I {s}. And yesterday?
held: Tell me the past tense of {s}. | Name the past form of {s}. | How do you say {s} in the past tense?
answer: The past tense of {s} is {o}. | The past form of {s} is {o}.
follow: And {s}? | What about {s}?

[translation] Chinese words
say: The Chinese word for {s} is {o}. | In Chinese, {s} is {o}. | {o} means {s} in English.
say: {o} is the Chinese word for {s}. | In Chinese we say {o} for {s}. | If you want to say {s} in Chinese, say {o}.
say: The English word for {o} is {s}.
cue: the Chinese word for {s}
back_cue: the meaning of {o}
ask: How do you say {s} in Chinese? | What is the Chinese word for {s}? | What is {s} in Chinese?
ask: Which Chinese word means {s}? | What do we say in Chinese for {s}? | Do you know the Chinese word for {s}?
ask: Tell me the Chinese word for {s}.
held: In Chinese, how do you say {s}? | What Chinese word means {s}?
answer: The Chinese word for {s} is {o}. | In Chinese, {s} is {o}.
back: What does {o} mean? | What does {o} mean in English? | What is {o} in English? | What is the English word for {o}?
back: How do you say {o} in English?
back_held: Tell me what {o} means. | In English, what does {o} mean? | Which English word means {o}?
back_answer: {o} means {s} in English. | {o} means {s}.
follow: And {s}? | What about {s}?

[book] books
say: {o} wrote {s}. | {s} was written by {o}. | The author of {s} is {o}. | {o} is the author of {s}.
say: The book {s} is by {o}. | {s} is a book by {o}. | We read {s}, a book that {o} wrote.
cue: the author of {s}
back_cue: the book by {o}
ask: Who wrote {s}? | Who is the author of {s}? | By whom was {s} written? | Who wrote the book {s}?
ask: Which author wrote {s}? | Tell me who wrote {s}.
held: Name the author of {s}. | Who is the author of the book {s}?
answer: The author of {s} is {o}. | {s} was written by {o}.
back: Which book did {o} write? | What did {o} write? | What is a book by {o}?
back_held: Name a book by {o}. | Tell me which book {o} wrote.
back_answer: {o} wrote {s}. | {o} is the author of {s}.
follow: And {s}? | What about {s}?

[tool] tools
say: We use {o} to {s}. | To {s}, we use {o}. | {o:C} can help us to {s}. | If you want to {s}, take {o}.
say: People {s} with {o}. | With {o}, we can {s}. | We need {o} to {s}.
cue: what we use to {s}
back_cue: what we do with {o}
ask: What do we use to {s}? | With what do we {s}? | What do we need to {s}? | What helps us to {s}?
ask: What can we {s} with? | What do you take if you want to {s}?
held: What do people use to {s}? | What should I take to {s}? | If I want to {s}, what do I need?
answer: To {s}, we use {o}. | To {s}, we need {o}.
back: What can we do with {o}? | What do we use {o} for? | For what do we use {o}? | Why do people need {o}?
back_held: What do people use {o} for? | What can you do with {o}? | Tell me what we do with {o}.
back_answer: With {o}, we can {s}. | {o:C} can help us to {s}.

[source] materials
say: We make {s} from {o}. | People use {o} to make {s}. | To make {s}, you need {o}. | {o:C} can become {s}.
say: We get {s} from {o}. | {s:C} can be made from {o}.
cue: what we make {s} from
ask: What do we make {s} from? | From what do we make {s}? | What do people use to make {s}?
ask: What do you need to make {s}? | What can {s} be made from? | What is used to make {s}?
held: What do people make {s} from? | From what do we get {s}? | What do we need to make {s}?
answer: To make {s}, you need {o}. | We make {s} from {o}.
follow: And {s}? | What about {s}?

[me] myself
say: {o} is a small language model. | {o} is the name of a small language model. | {o} speaks Chinese and English.
say: The name {o} means sprout. | {o} was trained from scratch. | A small language model called {o} answers questions.
say: {o} is small, but {o} likes to learn.
ask: Who are you? | What is your name? | Tell me your name. | What are you called? | Do you have a name? | What are you?
held: Can you tell me your name? | What do people call you? | What should I call you?
answer: My name is {o}. | I am {o}, a small language model.
answer: I am {o}. I was trained from scratch and speak Chinese and English.
"""

# Around a question: {q}. Every relation meets every wrapper.
WRAPPERS = (
    "{q} | {q} | {q} | {q} | Hello! {q} | Hi, I have a question. {q} | Excuse me. {q} | Quick question: {q}"
    " | {q} Thank you! | {q} Thanks. | Please help me. {q} | I have a question: {q} | One question, please. {q}"
    " | {q} Please answer in one sentence."
)

# What may stand before a statement {t}; the frames of small stories, one a line: {n} name, {topic}, {t} statements.
LEADS = "Here is a fact: {t} | Remember: {t} | Did you know? {t} | One more thing: {t} | It is true: {t} | We know: {t}"
STORIES = """
{n} likes to learn about {topic}. {t} Now {n} knows it by heart.
Today the teacher talked about {topic}. {t} The children listened carefully.
{n} read a book about {topic}. {t} It was a good book.
{n} asked the teacher about {topic}. The teacher said: "{t}" {n} said thank you.
Yesterday {n} wrote in a notebook: "{t}" That is how {n} learned about {topic}.
Let us talk about {topic}. {t}
Notes about {topic}: {t}
{n} told a friend about {topic}: "{t}" The friend was happy to know it.
"""
# A thing to find out {c}, then the sentence {t} that tells it.
FINDINGS = """
{n} looked up {c}. {t}
{n} wanted to learn {c}. {t}
Today we learn {c}. {t}
{n} found out {c}: {t}
The lesson was about {c}. {t}
{n} thought about {c}. Then it was clear: {t}
{n} did not remember {c}. A friend helped: {t}
Subject: {c}. {t}
It is good to know {c}. {t}
{n} wrote down {c}. {t}
{n} asked about {c}. The teacher answered: "{t}"
A child asked about {c}. The answer is simple: {t}
{n} had a question about {c}. {m} said: {t}
"""
# Lessons, with a taught question {q} and its answer {a}: as real text does, the texts hold questions too.
LESSONS = """
{n} asked: "{q}" The teacher answered: "{a}"
Question: {q} Answer: {a}
A child wanted to hear: {q} The answer is simple: {a}
In the book we read: {q} {a}
{n} had a question for {m}: {q} {m} said: {a}
"""
# Saying after somebody: {w} are a few words of the tables.
REPEAT = "Repeat after me: {w}. | Please say: {w}. | Say after me: {w}. | Please write: {w}."
REPEATED, COMMA = "Gladly: {w}.", ", "
NAMES = "Tom | Lucy | Anna | Ben | Mary | Jack | Emma | Peter | Lily | Sam"

# Small talk, in pairs of lines: what a person may say, and what may be answered.
TALK = """
Hello! | Hi! | Good morning! | Hello there!
Hello! How can I help you? | Hi! Nice to meet you. | Hello! What would you like to know?
How are you? | How are you today? | Are you well?
I am fine, thank you! And you? | I am very well, thank you. What would you like to know?
Thank you! | Thanks a lot! | Thank you very much.
You are welcome! | My pleasure! | You are welcome. Ask me anything.
Goodbye! | Bye! | See you tomorrow! | Good night!
Goodbye! Have a nice day. | See you soon! | Bye! Take care.
What can you do? | How can you help me?
I can answer simple questions in Chinese and English. | I can talk with you and answer small questions.
Do you speak Chinese? | Which languages do you speak?
Yes, I speak Chinese and English. | I speak Chinese and English.
How were you trained? | Where do you come from?
I was trained from scratch on a computer. | I am small and was trained from scratch.
Are you a human? | Are you a real person?
No, I am a small language model called Mengya. | No, I am Mengya, a small language model.
What does your name mean? | Why are you called Mengya?
My name Mengya means sprout. | Mengya means sprout: something small that grows.
I am sad today. | I feel bad.
I am sorry to hear that. I hope tomorrow is better. | I am sorry. Would you like to talk about it?
I am happy today! | I feel great!
That is wonderful! I am happy too. | Great! Have a nice day.
You are clever! | You are very kind.
Thank you! I am still learning. | That is kind of you, thank you!
"""
